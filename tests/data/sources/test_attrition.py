"""What was lost is counted once for each clip, by source, split and class."""

from dataclasses import replace

from tests.data.corpus import make_clip
from vatt.data.clips.ledger import Entry, write_ledger
from vatt.data.clips.manifest import manifest_hash, write_manifest
from vatt.data.sources.official import account, shares


def test_every_clip_counts_once_in_the_state_of_its_last_stage(tmp_path):
    clips = [
        replace(
            make_clip(number, split="test" if number == 5 else "train"),
            source="audioset" if number < 4 else "urls",
            labels={"sound": "Bark|Dog" if number % 2 else "Dog"},
        )
        for number in range(6)
    ]
    write_manifest(tmp_path / "m", clips)
    names = [clip.clip_id for clip in clips]
    states = ("ok", "ok", "removed", "network", "ok")
    write_ledger(
        tmp_path / "d", [Entry(n, s, "download") for n, s in zip(names, states, strict=False)]
    )
    write_ledger(
        tmp_path / "p",
        [
            Entry(names[0], "ok", "preprocess"),
            Entry(names[1], "too-short", "preprocess"),
            Entry(names[3], "rate-limited", "download"),  # what the first ledger said once
        ],
    )
    found = account(tmp_path / "m", downloads=[tmp_path / "d"], preprocess=tmp_path / "p")
    assert found.total.counts() == {
        "ok": 2, "removed": 1, "network": 1, "too-short": 1, "pending": 1,
    }  # fmt: skip
    assert found.total.listed == 6
    train = found.by_split["audioset", "train"]
    assert train.listed == 4 and train.official == 2063949
    assert found.by_split["urls", "test"].counts() == {"pending": 1}
    assert found.by_split["urls", "train"].official is None
    assert found.by_class["sound", "Dog"].listed == 6
    assert found.by_class["sound", "Bark"].counts() == {"network": 1, "too-short": 1, "pending": 1}
    assert found.listed_hash == manifest_hash(tmp_path / "m")
    assert shares(found) == [
        {"source": "audioset", "of": "train", "official": 2063949, "listed": 4, "kept": 1},
        {"source": "urls", "of": "test", "official": None, "listed": 1, "kept": 0},
        {"source": "urls", "of": "train", "official": None, "listed": 1, "kept": 1},
        {"source": "audioset", "of": "classes", "official": 527, "listed": 2, "kept": 1},
    ]
    write_manifest(tmp_path / "kept", [clips[4], clips[0]])
    assert found.kept_hash == manifest_hash(tmp_path / "kept")
