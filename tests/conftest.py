"""What holds for all tests."""

import signal

# Started as a background job of a shell, we and all our children would ignore SIGINT; tests that
# press Ctrl-C mean what a person at a terminal gets.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
