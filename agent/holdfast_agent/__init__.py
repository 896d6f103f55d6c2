"""What runs on every hypervisor: the agent and its workers, one worker for each protected VM.

Start at `main`; `supervisor` starts and adopts workers, `worker` is their process, and the whole
flow of one checkpoint stands in `checkpoint/capture.py`. `core/` is pure; the other folders are
adapters.
"""
