"""Shows a recorded run in the live view, at the time that it had then: for tests/test_live.py, in a terminal."""

import threading
import time

from test_live import recorded

from ambersafe_cli import health, live, onlooker

run = recorded("dpo")
assert run.curves.last
assert run.curves.last.time
run.began = run.curves.last.time - 90
run.checkpoint = ("step-288", run.curves.last.time - 12)
run.doing = "training"
for line in ("Running evaluation after 288 train examples", "creating checkpoint to write to step-288..."):
    run.tail.append(line)
run.advice = health.look(run.stage, run.curves.steps, run.curves.evaluations, run.planned_examples)
then = run.curves.last.time
time.time = lambda: then
with live.shown(run, onlooker._FOOTER, threading.Lock(), lambda: None):
    time.sleep(600)
