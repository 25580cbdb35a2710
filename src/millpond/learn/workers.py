"""One training by several workers on this machine, with Ray Train: each on a GPU of its own, or all on the processor.

It is `train.train` in each worker, and comes to what one worker comes to with the same batch size, seed and data. What
the workers need lies in a directory of Ray's, and so does what they tell: this process asks nothing of them, and ends
them whatever happens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from millpond import MillpondError
from millpond.learn.checkpoint import CheckpointError, Checkpoints
from millpond.learn.encoded import Encoded
from millpond.learn.local_ray import local_ray
from millpond.learn.models import TextModel
from millpond.learn.options import TrainingError, TrainOptions
from millpond.learn.parallel import Together
from millpond.learn.progress import Epoch, Progress, Training
from millpond.learn.train import Objective, train

GROUP_LIMIT_S = 1800
"""How long a worker waits for the others in one exchange: validation is within it."""
LOOK_EVERY_S = 0.2
MARKS_OF_A_LOST_ONE = ("Connection reset", "Connection closed", "actor died", "Worker unexpectedly exits", "OOM killer")
"""In what is said of a worker that is gone, by the others or by Ray."""


class _Told(msgspec.Struct, frozen=True, kw_only=True):
    """A line of what the first worker tells."""

    progress: Progress | None = None
    epoch: Epoch | None = None


class _End(msgspec.Struct, frozen=True, kw_only=True):
    """What the first worker came to."""

    training: Training | None = None
    error: str = ""
    kind: Literal["", "training", "checkpoint"] = ""


@dataclass(frozen=True)
class _Task:
    """What each worker is given; texts, labels and targets are files beside it."""

    directory: Path
    model: TextModel
    options: TrainOptions
    device: str
    seed: int
    threads: int
    loss: Any
    has_validation: bool
    checkpoints: Checkpoints | None


def train_on_workers(
    count: int,
    model: TextModel,
    data: Encoded,
    labels: NDArray[np.int64],
    validation: tuple[Encoded, NDArray[np.int64]] | None,
    options: TrainOptions,
    device: torch.device,
    *,
    seed: int,
    objective: Objective | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    checkpoints: Checkpoints | None = None,
) -> Training:
    """Train as `train` does, with `count` workers that share every batch; they are gone when it returns.

    Ctrl-C ends the workers and is raised: with `checkpoints` the training can go on from the last one.

    Raises:
        TrainingError: as `train`, there are too few GPUs, or a worker ended.
        CheckpointError: as `train`.
        RayError: Ray is not installed, or does not start.
    """
    check_workers(count, device)
    with local_ray(cpus=count + 1, gpus=count if device.type == "cuda" else 0) as directory:
        _put(directory, "train", data, labels)
        if validation is not None:
            _put(directory, "validation", *validation)
        if objective is not None:
            np.save(directory / "targets.npy", objective.targets)
        task = _Task(
            directory=directory,
            model=model.cpu(),
            options=options,
            device=device.type,
            seed=seed,
            threads=max(1, torch.get_num_threads() // count),
            loss=objective.loss if objective else None,
            has_validation=validation is not None,
            checkpoints=checkpoints,
        )
        _follow(task, count, on_progress, on_epoch)
        end = _read_end(directory)
        if end.training is None:
            raise {"checkpoint": CheckpointError}.get(end.kind, TrainingError)(end.error)
        model.load_state_dict(safetensors.torch.load_file(directory / "weights.safetensors"))
    model.to(device).eval()
    return end.training


def check_workers(count: int, device: torch.device) -> None:
    """Refuse a number of workers for which this machine has not the devices.

    Raises:
        TrainingError: there are too few GPUs, or the device is another machine's.
    """
    if device.type not in ("cpu", "cuda"):
        raise TrainingError(f"--gpus needs GPUs of this machine, or --device cpu; {device} is neither.")
    if device.type == "cuda" and (found := torch.cuda.device_count()) < count:
        raise TrainingError(
            f"there are {found} GPUs here, not {count}. Ask for fewer with --gpus, or share the processor among "
            "workers with --device cpu."
        )


def _follow(
    task: _Task, count: int, on_progress: Callable[[Progress], None], on_epoch: Callable[[Epoch], None]
) -> None:
    """Run the workers and pass on what the first one tells, until all have ended."""
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            _fit(task, count)
        except BaseException as error:  # it is raised below, in the thread that asked
            failures.append(error)

    # In a thread: in the main one Ray would take Ctrl-C for itself.
    running = threading.Thread(target=fit, name="ray-train", daemon=True)
    running.start()
    place = 0
    while True:
        alive = running.is_alive()
        told, place = _read_told(task.directory / "told.jsonl", place)
        for line in told:
            if line.progress is not None:
                on_progress(line.progress)
            if line.epoch is not None:
                on_epoch(line.epoch)
        if not alive:
            break
        running.join(LOOK_EVERY_S)
    if failures:
        raise TrainingError(
            f"a worker ended before the training did: {why_ended(failures[0])}. With --resume it goes on from the last "
            "checkpoint."
        ) from failures[0]


def why_ended(failure: BaseException) -> str:
    """Return why workers ended, in a line: what one of them raised, or that one was killed."""
    by_worker: dict[int, BaseException] = getattr(failure, "worker_failures", {}) or {0: failure}
    said = [(str(error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".") for error in by_worker.values()]
    # Whoever lives when another is gone only knows that its connection broke, and may tell so first.
    own = [line for line in said if not any(mark in line for mark in MARKS_OF_A_LOST_ONE)]
    return own[0] if own else "it was killed, or it crashed (dmesg tells whether the kernel had no memory left)"


def _fit(task: _Task, count: int) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = task.device == "cuda"
    TorchTrainer(
        _work,
        train_loop_config={"task": ray.put(task)},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=GROUP_LIMIT_S),
        scaling_config=ScalingConfig(num_workers=count, use_gpu=gpu),
        run_config=RunConfig(
            storage_path=str(task.directory / "train"),
            failure_config=FailureConfig(max_failures=0),
        ),
    ).fit()


def _work(config: dict[str, Any]) -> None:
    """Be one of the workers."""
    import ray
    from ray.train.torch import get_device

    task: _Task = ray.get(config["task"])
    device = get_device() if task.device == "cuda" else torch.device("cpu")
    torch.set_num_threads(task.threads)
    together = Together(device)
    is_first = together.rank == 0
    told = (task.directory / "told.jsonl").open("ab", buffering=0) if is_first else None

    def tell(line: _Told) -> None:
        if told is not None:
            told.write(msgspec.json.encode(line) + b"\n")

    checkpoints = None
    if (given := task.checkpoints) is not None:  # all take them up, the first writes them
        every_s = given.every_s if is_first else 0.0
        checkpoints = Checkpoints(given.directory, given.fingerprint, every_s=every_s, strict=given.strict)
    objective = None
    if task.loss is not None:
        objective = Objective(np.load(task.directory / "targets.npy", mmap_mode="r"), task.loss)
    data, labels = _take(task.directory, "train")
    try:
        training = train(
            task.model,
            data,
            labels,
            _take(task.directory, "validation") if task.has_validation else None,
            task.options,
            device,
            seed=task.seed,
            objective=objective,
            on_progress=lambda progress: tell(_Told(progress=progress)),
            on_epoch=lambda epoch: tell(_Told(epoch=epoch)),
            checkpoints=checkpoints,
            workers=together,
        )
    except MillpondError as error:
        kind: Literal["training", "checkpoint"] = "checkpoint" if isinstance(error, CheckpointError) else "training"
        end = _End(error=str(error), kind=kind)
    else:
        end = _End(training=training)
    if is_first:
        if end.training is not None:
            weights = {name: tensor.cpu().contiguous() for name, tensor in task.model.state_dict().items()}
            safetensors.torch.save_file(weights, task.directory / "weights.safetensors")
        (task.directory / "end.json").write_bytes(msgspec.json.encode(end))


def _put(directory: Path, name: str, data: Encoded, labels: NDArray[np.int64]) -> None:
    for part, array in (("ids", data.ids), ("starts", data.starts), ("labels", labels)):
        np.save(directory / f"{name}-{part}.npy", array)


def _take(directory: Path, name: str) -> tuple[Encoded, NDArray[np.int64]]:
    ids, starts, labels = (
        np.load(directory / f"{name}-{part}.npy", mmap_mode="r") for part in ("ids", "starts", "labels")
    )
    return Encoded(ids, np.asarray(starts)), np.asarray(labels)


def _read_told(path: Path, place: int) -> tuple[list[_Told], int]:
    """Return the whole lines of a file from `place` on, and where the next one begins."""
    if not path.exists():
        return [], place
    with path.open("rb") as file:
        file.seek(place)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    return [msgspec.json.decode(line, type=_Told) for line in whole.splitlines()], place + len(whole)


def _read_end(directory: Path) -> _End:
    return msgspec.json.decode((directory / "end.json").read_bytes(), type=_End)
