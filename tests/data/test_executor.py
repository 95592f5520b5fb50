"""The same work here, in processes and on a cluster that loses a machine: the same bytes."""

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest

from tests.data.corpus import demo_params, make_clip, make_corpus, sha256_of, write_media
from tests.data.sharding.test_shards import digests, write
from tests.test_dvc import wait_until
from vatt.data.clips.ledger import read_ledger
from vatt.data.clips.media import find_ffmpeg
from vatt.data.fetching.download import download
from vatt.data.workers import start_workers
from vatt.errors import DataError, MachineError

FILES = ("film.mp4", "page.mp4", "none.mp4")


def machine(**update):
    return demo_params().machine.model_copy(update=update)


def slowly(number):
    time.sleep(0.01)
    return number * number


def fail(number):
    raise DataError(f"no {number}", hint="leave it")


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_with_their_items_and_few_are_taken_ahead(workers):
    taken = []

    def items():
        for number in range(40):
            taken.append(number)
            yield number

    found = {}
    with start_workers(machine(workers=workers)) as pool:
        for item, result in pool.map(slowly, items()):
            found[item] = result
            assert len(taken) <= len(found) + max(2 * workers, 1)
    assert found == {number: number * number for number in range(40)}


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_function_raises_comes_out(workers):
    with (
        pytest.raises(DataError, match="no 3") as error,
        start_workers(machine(workers=workers)) as pool,
    ):
        list(pool.map(fail, [3]))
    assert error.value.hint == "leave it"


def test_a_worker_that_dies_is_the_machines_fault():
    with (
        pytest.raises(MachineError, match="worker process died"),
        start_workers(machine(workers=1)) as pool,
    ):
        list(pool.map(os._exit, [9]))


def die_at(marks, number):
    """End the worker at 4, but not before 5 has begun, and at 5 where it has not begun before."""
    mark = marks / "5"
    if number == 4:
        wait_until(mark.exists, seconds=60)
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 5 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_what_a_dying_worker_takes_along_is_done_again_and_one_cause_found(tmp_path):
    """4 dies whenever it runs; 5 only the first time, as when others take the memory."""
    with start_workers(machine(workers=2)) as pool:
        found = dict(pool.map(partial(die_at, tmp_path), range(12), instead=lambda n: [-n]))
    assert found == {number: number for number in (*range(4), -4, *range(5, 12))}


def test_workers_that_keep_dying_end_the_stage():
    with (
        pytest.raises(MachineError, match="a worker process died"),
        start_workers(machine(workers=1)) as pool,
    ):
        list(pool.map(os._exit, [9] * 20, instead=lambda code: [code]))


DEADLY = """#!/bin/sh
case "$*" in *victim*) kill -9 $PPID; sleep 5;; esac
exec {ffmpeg} "$@"
"""


def test_a_clip_that_kills_its_worker_is_one_lost_clip(tmp_path):
    clips, entries = make_corpus(tmp_path / "media", 6)
    data = tmp_path / "files"
    data.mkdir()
    victim = replace(make_clip(3), url="folder:victim.mp4")
    write_media(data / "victim.mp4")
    clips[3] = victim
    entries["clip-003"] = replace(entries["clip-003"], sha256=sha256_of(data / "victim.mp4"))
    program = tmp_path / "ffmpeg"
    program.write_text(DEADLY.format(ffmpeg=find_ffmpeg(None)))
    program.chmod(0o755)
    params = demo_params(location=data, require=())
    here = {"ffmpeg": program, "workers": 2}
    counts = write(tmp_path, clips, entries, params=params, samples_per_shard=6, machine=here)
    assert counts == {"ok": 5, "corrupt": 1}
    lost = read_ledger(tmp_path / "ledger.jsonl")["clip-003"]
    assert lost.state == "corrupt"
    assert lost.reason == "the process that cut it was killed, perhaps because memory ran out"


def test_ray_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(MachineError, match=r"pip install 'vattctl\[ray\]'"),
        start_workers(machine(executor="ray")),
    ):
        pass


@pytest.fixture(scope="module")
def cluster():
    """A head, and other nodes when they are added: processes of their own."""
    cluster = pytest.importorskip("ray.cluster_utils").Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1}
    )
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
def test_a_cluster_that_loses_a_machine_writes_the_same_shards(cluster, tmp_path):
    """Two nodes; one is killed while it writes. Its shard is done again on the other."""
    clips, entries = make_corpus(tmp_path / "media", 24, tests=4)
    for name in ("local", "ray"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "media").symlink_to(tmp_path / "media")
    write(tmp_path / "local", clips, entries, samples_per_shard=1)
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    shards = tmp_path / "ray" / "shards"
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_when, cluster, node, shards, 4)
        where = {"executor": "ray", "ray_address": cluster.address}
        write(tmp_path / "ray", clips, entries, samples_per_shard=1, machine=where)
        assert killed.result() < 24
    assert len(list(shards.glob("*.tar"))) == 24
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")


@pytest.mark.slow
def test_a_cluster_downloads_and_says_what_failed_there(cluster, tmp_path):
    write_media(tmp_path / "film.mp4")
    (tmp_path / "page.mp4").write_text("<html>")
    clips = [replace(make_clip(k), url=f"folder:{name}") for k, name in enumerate(FILES)]
    params = demo_params(source="folder", location=tmp_path).data
    states = {}
    for where in ("local", "ray"):
        here = machine(executor=where, ray_address=cluster.address, workers=1)
        ledger = tmp_path / f"{where}.jsonl"
        download(clips, params, here, media=tmp_path / where, ledger=ledger)
        states[where] = ledger.read_bytes()
    assert states["ray"] == states["local"] and b"corrupt" in states["ray"]
    here = machine(executor="ray", ray_address=cluster.address)
    with pytest.raises(DataError, match="no 3") as error, start_workers(here) as pool:
        list(pool.map(fail, [3]))
    assert error.value.hint == "leave it"
    with pytest.raises(MachineError, match="lost a task"), start_workers(here) as pool:
        list(pool.map(os._exit, [9]))


def kill_when(cluster, node, shards, done):
    """End a node once some shards are finished and one is being written; returns how many are."""
    while len(list((shards / "parts").glob("*.json"))) < done or not list(shards.glob(".*.tmp")):
        time.sleep(0.002)
    cluster.remove_node(node, allow_graceful=False)
    return len(list((shards / "parts").glob("*.json")))


def test_an_address_without_a_cluster_is_named():
    pytest.importorskip("ray")
    with (
        pytest.raises(MachineError, match=r"no Ray cluster at 127\.0\.0\.1:1"),
        start_workers(machine(executor="ray", ray_address="127.0.0.1:1")),
    ):
        pass
