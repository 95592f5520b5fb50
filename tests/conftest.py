"""What every test needs of the process that runs it."""

import signal

# A shell starts what runs in the background with SIGINT ignored, and children inherit that: then
# no test could see what Ctrl-C does.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
