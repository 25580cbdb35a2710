"""A real training job in miniature: reads its directory, pushes a small signed model, writes result.json.

`plan.json` beside the recipe says how it should go: `[{"right": 90, "of": 100, "act": "…"}, …]`, one entry an attempt
(the last one repeats). It counts its attempts in `attempts` beside the plan. The models were signed before, for
importing model-signing takes longer than all the rest.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from millpond.process import die_with_parent
from millpond.registry import Store

die_with_parent()
place = Path(sys.argv[-1])
spec = json.loads((place / "job.json").read_bytes())
recipe = Path(spec["recipe"])
count_file = recipe.with_name("attempts")
count_file.open("a").write("x")
attempt = len(count_file.read_text())
plans = json.loads(recipe.with_name("plan.json").read_text())
plan = plans[min(attempt, len(plans)) - 1]
print(f"attempt {attempt}: {plan}", flush=True)


def say(stage: str, done: int, total: int, loss: float | None = None) -> None:
    with (place / "progress.jsonl").open("a") as file:
        file.write(json.dumps({"stage": stage, "done": done, "total": total, "loss": loss}) + "\n")


for done in range(1, 4):
    say("train", done, 3, 1.0 / done)
act = plan.get("act", "")
if act == "crash":
    sys.exit("this attempt fails on purpose")
if act == "hang":
    time.sleep(600)
if act == "wait":  # until the test says go
    deadline = time.monotonic() + 60
    while not recipe.with_name("go").exists() and time.monotonic() < deadline:
        time.sleep(0.02)

signed = "forged" if act == "forge" else "signed"
model = recipe.with_name("models").resolve() / signed / plan.get("version", spec["version"])
pushed = Store(Path(spec["registry"])).push(model)

right, rows = plan["right"], plan["of"]
before = plan.get("champion_right", right) if spec["champion"] else 0
both = min(right, before)
heldout = len((place / "heldout.jsonl").read_bytes().splitlines())
test = {
    "rows": rows,
    "both_right": both,
    "only_champion_right": before - both,
    "only_candidate_right": right - both,
}
of_heldout = {
    "rows": heldout,
    "both_right": 0,
    "only_champion_right": 0,
    "only_candidate_right": heldout if plan.get("better", True) else 0,
}
result = {
    "digest": pushed.digest if act != "lie" else "sha256:" + "0" * 64,
    "version": pushed.version,
    "test": test,
    "heldout": of_heldout,
    "by_source": {"reviews.csv": test} | ({"corrections, held out": of_heldout} if heldout else {}),
    "official_test": False,
    "metrics": {"test_accuracy": right / rows},
}
unfinished = place / "unfinished"
unfinished.write_text(json.dumps(result) if act != "garble" else '{"digest": 7}')
unfinished.rename(place / "result.json")
if act == "linger":
    time.sleep(600)
if act == "die late":
    os.kill(os.getpid(), signal.SIGKILL)
