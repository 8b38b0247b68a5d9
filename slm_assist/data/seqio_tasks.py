"""seqio: Tasks and Mixtures by name, the Tasks that this package registers, and packed batches as ours.

A name in a config is `seqio:NAME` or `seqio:NAME:SPLIT`; `seqio:package.module/NAME` imports that module first, the
one that registers NAME. Loads seqio, tfds and TensorFlow when something here is called, never on import.
"""

import contextlib
import glob
import importlib
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from slm_assist.data.text_files import read_jsonl
from slm_assist.data.tokenizers import Vocabulary, compare
from slm_assist.errors import UserError, nearest

PILE, C4, TINY_STORIES = "slm_assist.pile", "slm_assist.c4", "slm_assist.tiny_stories"
TASKS = (PILE, C4, TINY_STORIES)
# Names in tfds, and how a set gets where tfds looks for it.
_TFDS_NAMES = {C4: "c4/en:3.1.0", TINY_STORIES: "roneneldan__tinystories:*.*.*"}
_HUGGING_FACE = {"roneneldan__tinystories": "huggingface:roneneldan__TinyStories"}
_CHUNK = 256  # documents that a Pile file gives at a time
_OPEN_FILES = 64


def modules(where: str) -> tuple[Any, Any, Any]:
    """The modules (seqio, tensorflow_datasets, tensorflow), with GPUs hidden from TensorFlow.

    Args:
      where: the name in the config that asks for them, for errors.

    Raises:
      UserError: one is missing or cannot be imported; says what to install.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # already in use: whoever did that has decided
            tf.config.set_visible_devices([], "GPU")
        import seqio
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"{where}: needs {error.name or error}: pip install seqio tensorflow-datasets") from error
    except Exception as error:  # protobuf has an exception of its own for code that is newer than itself
        reason = str(error).split(". ")[0].splitlines()[0]
        raise UserError(f"{where}: seqio cannot be imported ({reason}): pip install 'sentencepiece<0.2.3'") from error
    return seqio, tfds, tf


def reason(error: Exception) -> str:
    """What TensorFlow's error says, in one line; of a UserError inside a pipeline, its words."""
    text = str(error)
    if "UserError: " in text:
        return text.split("UserError: ", 1)[1].splitlines()[0]
    lines = [line for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return lines[0].rpartition("}} ")[2][:200]


def find(spec: str, vocabulary: Vocabulary | None = None) -> tuple[Any, str]:
    """The registered Task or Mixture that `spec` names, and its split, empty where `spec` names none.

    Args:
      spec: [seqio:][package.module/]NAME[:SPLIT].
      vocabulary: for this package's own Tasks, which take any.

    Raises:
      UserError: the module cannot be imported, nothing has this name (says near ones), no such split.
    """
    seqio, _, _ = modules(spec)
    module, _, name = spec.removeprefix("seqio:").rpartition("/")
    if module:
        _import(spec, module)
    names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names(), *TASKS}
    split = ""
    if name not in names and ":" in name:  # a Task's name may have a colon itself
        name, _, split = name.rpartition(":")
    if name not in names:
        raise UserError(
            f"source {spec}: no seqio Task or Mixture {name!r} is registered{nearest(name, names)}; there are "
            f"{_some(names)}: write seqio:package.module/{name or 'NAME'} to import the module that registers it"
        )
    if name in TASKS:
        register(vocabulary)
        if name not in seqio.TaskRegistry.names():
            raise UserError(f"source {spec}: set SLM_ASSIST_PILE to the folder with the Pile's files")
    provider = seqio.get_mixture_or_task(name)
    for task in seqio.get_subtasks(provider):
        _check_prepared(spec, task.source, split)
    if split and split not in provider.splits:
        raise UserError(
            f"source {spec}: {name} has no split {split!r}{nearest(split, provider.splits)}; it has "
            f"{_some(provider.splits)}"
        )
    return provider, split


def _some(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none"


def _import(spec: str, module: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a module may raise anything while it is imported
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise UserError(
                f"source {spec}: there is no module {error.name!r}; install it, or add its folder to PYTHONPATH"
            ) from error
        raise UserError(f"source {spec}: importing {module} fails: {error!r}") from error


def _check_prepared(spec: str, source: Any, split: str) -> None:
    """UserError where a Task would begin to download a set from tfds in the middle of something else."""
    seqio, _, _ = modules(spec)
    if isinstance(source, seqio.TfdsDataSource):
        loader = source.tfds_dataset
        wanted = [split] if split else list(loader.tfds_splits or [None])
        for name, data_dir in {loader.get_split_params(each) for each in wanted}:
            if name:
                tfds_builder(spec, name, data_dir)


def tfds_builder(spec: str, name: str, data_dir: str | None = None) -> Any:
    """The builder of a set that tfds has prepared on disk; never downloads.

    Args:
      spec: the name in the config, for errors.
      name: in tfds, NAME[/CONFIG][:VERSION]; with `huggingface:` in front the name of a set made from there.
      data_dir: where sets are; by default TFDS_DATA_DIR, else where tfds keeps them (~/tensorflow_datasets).

    Raises:
      UserError: tfds knows no such set (says near ones), or it is not prepared (says how to).
    """
    _, tfds, _ = modules(spec)
    name = name.removeprefix("huggingface:").lower() if name.startswith("huggingface:") else name
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or None
    try:
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError:
        pass
    except ValueError as error:
        raise UserError(f"source {spec}: {str(error).splitlines()[0]}") from error
    base = name.partition(":")[0].partition("/")[0]
    known = tfds.list_builders(with_community_datasets=False)
    place = data_dir or os.path.expanduser(tfds.core.constants.DATA_DIR)
    if "__" in base:
        there = _HUGGING_FACE.get(base, f"huggingface:{base}")
        get = f"tfds.builder({there!r}).download_and_prepare() with the package datasets"
    elif base in known:
        get = f"`tfds build {name.partition(':')[0]}`"
    else:
        raise UserError(
            f"source {spec}: tfds has no set {base!r}{nearest(base, known)}, and none is prepared in {place}"
        )
    raise UserError(
        f"source {spec}: {name} is not prepared in {place}; prepare it with {get} where there is a network, or set "
        "TFDS_DATA_DIR to where it is"
    )


def vocabulary_of(spec: str, provider: Any, given: Vocabulary | None = None) -> Vocabulary | None:
    """The vocabulary of a Task's ids: its own, or the `given` one where its features have none.

    Raises:
      UserError: it has no feature "targets", a vocabulary that is not ours to read, or another than `given`.
    """
    seqio, _, _ = modules(spec)
    features = provider.output_features
    if "targets" not in features:
        raise UserError(f"source {spec}: it has no output feature 'targets' but {_some(features)}; add one to the Task")
    if isinstance(features["targets"].vocabulary, seqio.PassThroughVocabulary):
        return given
    from slm_assist.data.seqio_vocabulary import from_seqio

    own = from_seqio(features["targets"].vocabulary)
    if given is not None and (difference := compare(own.with_sentinels(0), given.with_sentinels(0))):
        raise UserError(
            f"source {spec}: its vocabulary is not that of the run (data.vocabulary or the teacher's): {difference}; "
            "use the Task's vocabulary for both"
        )
    return given or own


def register(vocabulary: Vocabulary | str | Path | None = None, *, pile: str = "") -> list[str]:
    """Registers this package's Tasks with seqio, anew if they are there; returns their names.

    `slm_assist.c4` and `slm_assist.tiny_stories` read what tfds has prepared (c4/en and
    huggingface:roneneldan__TinyStories), `slm_assist.pile` the Pile's own files. Documents that do not fit a
    row are cut into pieces, none is trimmed; text and, of the Pile, `domain` stay beside the ids.

    Args:
      vocabulary: of the ids, or its path; by default SLM_ASSIST_VOCABULARY's, else bytes.
      pile: a folder with train*.jsonl.zst or train/*.jsonl.zst and val*.jsonl.zst, or globs of training files;
        by default SLM_ASSIST_PILE's. Without either there is no `slm_assist.pile`.

    Raises:
      UserError: seqio is missing, the vocabulary cannot be read, no file is there.
    """
    seqio, _, tf = modules("slm_assist.data.seqio_tasks.register")
    sources = {
        name: seqio.TfdsDataSource(tfds_name, splits=("train", "validation"), read_only=True)
        for name, tfds_name in _TFDS_NAMES.items()
    }
    if pile := pile or os.environ.get("SLM_ASSIST_PILE", ""):
        as_it_is = tf.autograph.experimental.do_not_convert(_read_pile)
        sources[PILE] = seqio.FileDataSource(as_it_is, _pile_files(pile))
    vocabulary = _for_seqio(vocabulary or os.environ.get("SLM_ASSIST_VOCABULARY"))
    feature = seqio.Feature(vocabulary, add_eos=vocabulary.eos_id is not None, dtype=tf.int32)
    for name, source in sources.items():
        if name in seqio.TaskRegistry.names():
            seqio.TaskRegistry.remove(name)
        steps = [_text_to_targets, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos, _cut]
        seqio.TaskRegistry.add(name, source=source, preprocessors=steps, output_features={"targets": feature})
    return sorted(sources)


def _for_seqio(vocabulary: Vocabulary | str | Path | None) -> Any:
    from slm_assist.data.seqio_vocabulary import seqio_vocabulary

    if vocabulary is None:
        seqio, _, _ = modules("slm_assist.data.seqio_tasks.register")
        return seqio.ByteVocabulary()
    return seqio_vocabulary(vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary.load(vocabulary))


def _text_to_targets(dataset: Any) -> Any:
    keep = {"text": "targets", "domain": "domain"}
    return dataset.map(lambda record: {keep[key]: value for key, value in record.items() if key in keep})


def _cut(dataset: Any, sequence_length: Mapping[str, int] | None) -> Any:
    """Documents in pieces of at most a row; whole ones where no length is asked for."""
    if sequence_length is None:
        return dataset
    _, _, tf = modules("seqio")

    def pieces(record):
        ids, length = record["targets"], sequence_length["targets"]
        starts = tf.data.Dataset.range(0, tf.size(ids, tf.int64), length)
        return starts.map(lambda start: {"targets": ids[start : start + length]})

    return dataset.flat_map(pieces)


def _pile_files(pile: str) -> dict[str, list[str]]:
    """Files by split of a folder in the Pile's layout, or of globs of training files."""
    if os.path.isdir(folder := os.path.expanduser(pile)):
        patterns = {"train": ("train*.jsonl*", "train/*.jsonl*"), "validation": ("val*.jsonl*",)}
        found = {
            split: [file for pattern in some for file in sorted(glob.glob(f"{folder}/{pattern}"))]
            for split, some in patterns.items()
        }
    else:
        globs = [os.path.expanduser(part.strip()) for part in pile.split(",")]
        found = {"train": [file for pattern in globs for file in sorted(glob.glob(pattern))]}
    if not found["train"]:
        raise UserError(f"SLM_ASSIST_PILE={pile}: no file train*.jsonl.zst, train/*.jsonl.zst or of that name is there")
    return {split: files for split, files in found.items() if files}


class _PileReader:
    """Documents of a file as a pure function of (file, number of the chunk), quick where chunks come in order.

    So a tf.data iterator over them can be saved and restored, which one over a Python generator cannot.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._open: OrderedDict[bytes, tuple[int, Any]] = OrderedDict()

    def __call__(self, path: bytes, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Texts and domains, bytes [n]; none behind the last chunk."""
        with self._lock:
            at, documents = self._open.pop(path, (index + 1, None))
            if at > index:
                file = Path(os.fsdecode(path))
                documents = read_jsonl(file, lambda n: None, text_field="text", domain_field="meta.pile_set_name")
                at = 0
            for _ in islice(documents, (index - at) * _CHUNK):
                pass  # they were read before the iterator was restored
            chunk = list(islice(documents, _CHUNK))
            if chunk:
                self._open[path] = (index + 1, documents)
            while len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return _strings([document.text for document in chunk]), _strings([document.domain for document in chunk])


def _strings(texts: list[str]) -> np.ndarray:
    array = np.empty(len(texts), object)
    array[:] = [text.encode() for text in texts]
    return array


_pile_reader = _PileReader()


def _read_pile(path: Any) -> Any:
    """A tf.data.Dataset of {"text", "domain"} from one file."""
    _, _, tf = modules("seqio")

    def chunk(index):
        texts, domains = tf.numpy_function(_pile_reader, [path, index], (tf.string, tf.string), stateful=False)
        return tf.ensure_shape(texts, [None]), tf.ensure_shape(domains, [None])

    chunks = tf.data.Dataset.range(1 << 40).map(chunk).take_while(lambda texts, domains: tf.size(texts) > 0)
    return chunks.unbatch().map(lambda text, domain: {"text": text, "domain": domain})


def ours(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A batch of seqio's LMFeatureConverter or PrefixLMFeatureConverter, packed or not, as a batch of this package.

    Each document has the loss it has alone: seqio starts a segment with the converter's `bos_id` as its first
    input, so its first token is predicted too, and segments see only themselves. Of a prefix, tokens that the
    prefix itself shows carry no loss, even where the converter (`loss_on_targets_only=False`) gives them some.

    Args:
      batch: decoder_input_tokens, decoder_target_tokens, decoder_loss_weights [B, T]; packed also
        decoder_segment_ids and decoder_positions; with a prefix decoder_causal_attention.

    Returns:
      tokens, targets, segment_ids, positions: int32 [B, T]; mask: float32 [B, T]; and, with a prefix,
      prefix_mask: bool [B, T].

    Raises:
      UserError: the batch is not of these converters.
    """
    wanted = ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights")
    if missing := [name for name in wanted if name not in batch]:
        raise UserError(
            f"a seqio batch without {', '.join(missing)} but with {_some(batch)}: use LMFeatureConverter or "
            "PrefixLMFeatureConverter"
        )
    arrays = {name: np.asarray(value) for name, value in batch.items() if name.startswith("decoder_")}
    targets = arrays["decoder_target_tokens"].astype(np.int32)
    if "decoder_segment_ids" in arrays:
        segment_ids = arrays["decoder_segment_ids"].astype(np.int32)
        positions = arrays["decoder_positions"].astype(np.int32)
    else:  # one document a row, up to the last token that is not padding
        segment_ids = np.maximum.accumulate((targets != 0)[:, ::-1], axis=1)[:, ::-1].astype(np.int32)
        positions = np.arange(targets.shape[1], dtype=np.int32) * segment_ids
    mask = arrays["decoder_loss_weights"].astype(np.float32) * (segment_ids > 0)
    made = {
        "tokens": arrays["decoder_input_tokens"].astype(np.int32),
        "targets": targets,
        "segment_ids": segment_ids,
        "positions": positions,
        "mask": mask,
    }
    if "decoder_causal_attention" in arrays:
        prefix = arrays["decoder_causal_attention"].astype(bool) & (segment_ids > 0)
        shown = prefix[:, :-1] & prefix[:, 1:] & (segment_ids[:, :-1] == segment_ids[:, 1:])
        mask[:, :-1] *= ~shown
        made["prefix_mask"] = prefix
    return made
