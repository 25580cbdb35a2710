"""One run of MLPerf Training's sentiment benchmark (v0.5, retired): from the files to 90.6 % of the test split.

The closed division is the reference's model and method; its source is `sentiment_analysis/paddle` of
github.com/mlcommons/training, and what we do otherwise stands in `DEVIATIONS`. The open division is any model. By the
reference's rule the whole test split is read after each epoch: what comes out is a time, never a reason to tune.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta
from torch import Tensor, nn

import millpond
from millpond import MillpondError
from millpond.learn import corpora
from millpond.learn.datasets import Dataset, shuffled
from millpond.learn.encoded import Encoded
from millpond.learn.fit import Report, pick_device
from millpond.learn.mllog import Log
from millpond.learn.models import build, options_of
from millpond.learn.models.seqcnn import SeqCnn
from millpond.learn.options import TrainingError, TrainOptions
from millpond.learn.progress import Epoch, Progress
from millpond.learn.recipes import ModelTable, Recipe, load_data
from millpond.learn.run import set_threads
from millpond.learn.sources import is_url, sources_of
from millpond.learn.train import DEFAULTS, complete, predict, train
from millpond.schema import JobProgress
from millpond.settings import LearnSettings

BENCHMARK = "sentiment_analysis"
CORPUS = "imdb"
TARGET = 0.906
"""Share of the test split that must be answered right; the reference stops when it has *more*, and so do we."""
MAX_EPOCHS = 100
"""The reference's, after which it gives up."""
CLOSED_MODEL: dict[str, Any] = {
    "embedding": 1024,
    "filters": 1024,
    "min_count": 75,
    "max_vocabulary": 5147,
    "max_words": 100_000,
    "last_words": 0,
    "dropout": 0.0,
    "embedding_dropout": 0.0,
    "prior": False,
}
CLOSED_TRAINING = TrainOptions(
    epochs=MAX_EPOCHS, batch_size=128, learning_rate=5e-4, schedule="constant", by_length=False
)
OPEN_MODELS = ("ngram", "seqcnn", "lstm")
"""Those that need nothing but the corpus."""
DEVIATIONS = (
    "vocabulary: the 5,147 most frequent words seen 75 times in the training split; the reference's are the 5,147 seen "
    "more than 150 times in training and test split together, and no test text is read before the run here",
    "words: punctuation is kept, as words of its own; the reference deletes it",
    "accuracy: of all test texts; the reference takes the mean of its batches' accuracies, the last of which is small",
    "clock: MLPerf does not count vocabulary and tokenizing; here both are within the time",
    "Adam: PyTorch's, on every row of the embedding at each step; the reference's embedding has sparse gradients, and "
    "Paddle of 2018 may leave the rows that a batch lacks as they are",
)
RULES = (
    "timed: all from the first look at the texts to the evaluation that reaches the target: reading, vocabulary, "
    "encoding, first weights, training, and every evaluation",
    "not timed: starting the process, the device, and bringing the files into a prepared set, as MLPerf lets data be "
    "reformatted; each run is a process of its own",
    "quality: accuracy on the whole test split after each epoch, over the target; a run that does not get there within "
    "its epochs is aborted",
    "test split: read after each epoch, as the reference does; never tune on what this shows",
    "result: the mean of the runs without the fastest and the slowest; none where a run was aborted",
)
PRECISIONS = {"float32": "fp32", "bfloat16": "bfloat16", "float16": "fp16"}
LIBRARIES = ("torch", "tokenizers", "numpy")


class RulesError(MillpondError):
    """What was asked for is not what the division allows."""


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is run; `plan.json` of a submission's directory."""

    division: Literal["closed", "open"]
    recipes: dict[str, Recipe]
    """By model. The seed is each run's own; all training rows are learned from, none are held back."""
    device: str
    """Of the local runs; on the pool it is the lease's."""
    rehearsal: Annotated[int, Meta(ge=2)] | None = None
    """Rows of each split that are used, to see that all works; such runs give no result."""


def plan(
    division: Literal["closed", "open"],
    data: Mapping[str, Any],
    *,
    models: list[str],
    options: Mapping[str, Any],
    training: Mapping[str, Any],
    device: str,
    rehearsal: int | None = None,
) -> Plan:
    """Return the plan of a submission; `training` are changes of the training options, what is None changes nothing.

    Raises:
        RulesError: the closed division allows no such change.
        DataError, ModelError: the data, a model or its options are not known.
    """
    from millpond.learn.recipes import read_recipe

    changes = {key: value for key, value in training.items() if value is not None}
    if division == "closed":
        changed = [key for key in changes if key not in ("epochs", "precision", "compile")]
        changed += [f"model {model}" for model in models if model != "seqcnn"] + list(options)
        if not rehearsal and data.get("corpus") != CORPUS:
            changed.append("other data")
        if changed:
            raise RulesError(
                f"the closed division is the reference's model, options and data: {', '.join(changed)} cannot be "
                "changed in it. Use --division open."
            )
        models, options = ["seqcnn"], CLOSED_MODEL
        changes = msgspec.to_builtins(CLOSED_TRAINING) | changes
    models = models or list(OPEN_MODELS)
    if options and len(models) != 1:
        raise RulesError("--option belongs to one model: name it with --model, and no other.")
    recipes = {}
    for model in models:
        if rehearsal and model in DEFAULTS:  # whole batches, as in a run
            changes |= {"epochs": 1, "batch_size": training.get("batch_size") or DEFAULTS[model].batch_size}
        if division == "closed":
            changes["batch_size"] = CLOSED_TRAINING.batch_size
        table = {"data": data, "model": {"architecture": model, "options": options}, "training": changes}
        recipe = read_recipe(None, table | {"validation": 0.0})
        recipes[model] = msgspec.structs.replace(recipe, model=ModelTable(architecture=model, options=dict(options)))
    return Plan(division=division, recipes=recipes, device=device, rehearsal=rehearsal)


class _Reached(Exception):
    """The target is reached; it leaves the training loop."""


def run(plan: Plan, model: str, seed: int, settings: LearnSettings, log: Log, *, pooled: bool, report: Report) -> bool:
    """Make one run, written to `log`; return whether it reached the target.

    Raises:
        DataError: the data cannot be used.
        KeyboardInterrupt: Ctrl-C, after which the log is no run's.
    """
    recipe = msgspec.structs.replace(plan.recipes[model], seed=seed)
    architecture = recipe.model.architecture
    options = options_of(architecture, recipe.model.options)
    set_threads(settings)
    log.event("cache_clear", _forget(recipe, settings))
    log.start("init_start")
    device = pick_device("auto" if pooled else plan.device)
    torch.zeros(1, device=device).item()  # the device is awake
    hardware = system(device, pooled=pooled)
    log.event("submission_benchmark", BENCHMARK)
    log.event("submission_division", plan.division)
    log.event("submission_org", "none: unverified, and the benchmark is retired")
    log.event("submission_platform", hardware["accelerator_model_name"] or hardware["host_processor_model_name"])
    log.event("submission_status", "research")
    log.event("config_filename", "plan.json")
    log.event("seed", seed)
    log.event("system", hardware)
    log.end("init_stop")
    log.start("run_start")
    try:
        number, why = _train(plan, recipe, options, load_data(plan.recipes[model], settings), device, log, report)
    except TrainingError as error:
        number, why = 0, str(error)
    log.end("run_stop", status="aborted" if why else "success", epoch_num=number, why=why)
    return not why


def _train(
    plan: Plan, recipe: Recipe, options: Any, dataset: Dataset, device: torch.device, log: Log, report: Report
) -> tuple[int, str]:
    """Train until the target is reached; return after which epoch, and why it was not."""
    learned, test = dataset.train, dataset.test
    log.event("rows", {"train": len(learned), "test": len(test)})
    if plan.rehearsal:
        learned, test = (split.take(shuffled(split, 0)[: plan.rehearsal]) for split in (learned, test))
    report(JobProgress(stage="data", note=f"encoding {len(learned) + len(test):,} texts"))
    encoder = options.learn_encoder(learned.texts)
    encoded, test_encoded = Encoded.of(encoder, learned.texts), Encoded.of(encoder, test.texts)
    how = complete(recipe.training, recipe.model.architecture, len(learned))
    assert how.epochs is not None
    log.event("train_samples", len(learned))
    log.event("eval_samples", len(test))
    log.event("data_digest", dataset.digest)
    log.event("vocabulary_size", encoder.vocabulary)
    _log_method(log, how)
    torch.manual_seed(recipe.seed)
    model = build(recipe.model.architecture, options, encoder.rows, len(dataset.labels))
    if plan.division == "closed":
        assert isinstance(model, SeqCnn)
        initialize(model)
        for name, _ in model.named_parameters():
            log.event("weights_initialization", None, tensor=name)
    model.prepare(encoded, learned.labels)
    done = 0

    def on_progress(at: Progress) -> None:
        note = f"epoch {at.epoch}/{at.epochs}, {at.texts_per_s:,.0f} texts/s"
        report(JobProgress(stage="train", done=at.step, total=at.steps, loss=at.loss, accuracy=at.accuracy, note=note))

    def on_epoch(epoch: Epoch) -> None:
        nonlocal done
        done = epoch.epoch
        log.end("epoch_stop", epoch_num=done)
        log.start("eval_start", epoch_num=done)
        report(JobProgress(stage="evaluate", note=f"epoch {done}, {len(test):,} test texts"))
        accuracy = float((predict(model, test_encoded, device).argmax(1) == test.labels).mean())
        log.event("eval_accuracy", accuracy, epoch_num=done)
        log.end("eval_stop", epoch_num=done)
        if accuracy > TARGET:
            raise _Reached
        model.train()
        if done < (how.epochs or 0):
            log.start("epoch_start", epoch_num=done + 1)

    log.start("epoch_start", epoch_num=1)
    try:
        training = train(
            model,
            encoded,
            learned.labels,
            None,
            how,
            device,
            seed=recipe.seed,
            on_progress=on_progress,
            on_epoch=on_epoch,
        )
    except _Reached:
        return done, ""
    if training.interrupted:
        raise KeyboardInterrupt
    return done, training.error or f"not more than {TARGET:.1%} right after epoch {done}"


def initialize(model: SeqCnn) -> None:
    """Draw the weights as the reference does: Xavier's uniform for each of Paddle's matrices, biases 0.

    Paddle's convolution over words is one matrix [width × embedding, filters], and its last layer one matrix for each
    convolution, which is what the limits follow from. Glorot and Bengio 2010.
    """
    uniform = nn.init.uniform_

    def limit(inputs: int, outputs: int) -> float:
        return math.sqrt(6 / (inputs + outputs))

    with torch.no_grad():
        bound = limit(*model.embedding.weight.shape)
        uniform(model.embedding.weight, -bound, bound)
        model.embedding.weight[0] = 0.0  # padding, which the reference has none of
        for convolution in model.convolutions:
            weight, bias = convolution.weight, convolution.bias
            assert isinstance(weight, Tensor)
            assert isinstance(bias, Tensor)
            filters, embedding, width = weight.shape
            bound = limit(width * embedding, filters)
            uniform(weight, -bound, bound)
            nn.init.zeros_(bias)
        bound = limit(model.linear.in_features // len(model.convolutions), model.linear.out_features)
        uniform(model.linear.weight, -bound, bound)
        nn.init.zeros_(model.linear.bias)


def _log_method(log: Log, how: TrainOptions) -> None:
    """Write the hyperparameters, by MLPerf's names where it has one."""
    precision = PRECISIONS[how.precision or "float32"]
    adam = {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8}  # PyTorch's, which are Paddle's
    log.event("global_batch_size", how.batch_size)
    log.event("micro_batch_size", how.batch_size)
    log.event("gradient_accumulation_steps", 1)
    log.event("opt_name", "adam")
    log.event("opt_base_learning_rate", how.learning_rate)
    for name, value in adam.items():
        log.event(f"opt_adam_{name}", value)
    log.event("opt_gradient_clip_norm", how.clip_norm)
    log.event("opt_learning_rate_decay_schedule", how.schedule)
    for where in ("linear", "attn", "comm"):  # the rules want all three, whether or not a model has them
        log.event(f"lowest_numerical_precision_in_{where}", precision if where == "linear" else "fp32")
    for kind in ("tensor", "pipeline", "context", "expert"):
        log.event(f"{kind}_parallelism", 1)
    log.event("training", msgspec.to_builtins(how))


def system(device: torch.device, *, pooled: bool) -> dict[str, Any]:
    """Return hardware and software by the names of MLPerf's system description."""
    name = ""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        with contextlib.suppress(AttributeError, RuntimeError):
            name = str(module.get_device_name(device))
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "number_of_nodes": 1,
        "host_processor_model_name": _processor(),
        "host_processor_core_count": os.cpu_count(),
        "host_processor_threads_used": torch.get_num_threads(),
        "host_memory_capacity": f"{memory_bytes / 2**30:.0f} GiB",
        "accelerators_per_node": 0 if device.type == "cpu" else 1,
        "accelerator_model_name": f"{name or device.type} (over the pool)" if pooled else name,
        "device": str(device),
        "framework": f"PyTorch {torch.__version__}",
        "operating_system": f"{platform.system()} {platform.release()}",
        "other_software_stack": {
            "millpond": millpond.__version__,
            "python": platform.python_version(),
            **{library: version(library) for library in LIBRARIES},
            **({"cuda": torch.version.cuda} if torch.version.cuda else {}),
        },
    }


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _forget(recipe: Recipe, settings: LearnSettings) -> bool:
    """Have the kernel drop what it holds of the data's files in memory; return whether it was asked for each.

    The whole cache can only be dropped by root, and is other programs' too.
    """
    data, files = recipe.data, list[Path]()
    for source in (data.file, data.test_file):
        if source is not None and is_url(source):
            return False
        files += [file for _, place in sources_of(source) for file in _files(Path(place))] if source else []
    if data.corpus is not None:
        files += _files(corpora.place(data.corpus, settings))
    files += _files(settings.home / "prepared")
    try:
        for file in files:
            handle = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)
    except OSError:
        return False
    return bool(files)


def _files(place: Path | None) -> Iterator[Path]:
    if place is not None and place.is_dir():
        yield from (path for path in sorted(place.rglob("*")) if path.is_file())
    elif place is not None and place.is_file():
        yield place
