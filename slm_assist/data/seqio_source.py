"""Documents from tensorflow-datasets (`tfds:`) and from seqio's Tasks and Mixtures (`seqio:`).

`tfds:NAME[/CONFIG][:VERSION][:SPLIT]` reads a set that is prepared on disk (TFDS_DATA_DIR, else
~/tensorflow_datasets) and never downloads one. `seqio:[package.module/]NAME[:SPLIT]` reads a Task, or each Task of
a Mixture once, under its name as domain: rates are for streaming (stream.py), here data.domain_weights does it.
Without SPLIT, train is for training and validation, where there is one, for validation.
"""

import functools
import hashlib
import json
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slm_assist.data import seqio_tasks
from slm_assist.data.documents import Document, OnBytes, Part, Source
from slm_assist.data.tokenizers import Vocabulary
from slm_assist.errors import UserError, nearest

if TYPE_CHECKING:
    from slm_assist.data.templates import Templates

_TFDS = re.compile(r"tfds:(?P<name>(?:huggingface:)?[^:]+(?::[\d*]+\.[\d*]+\.[\d*]+)?)(?::(?P<split>.+))?")
_PROBED = 64  # documents whose contents are in the fingerprint of a Task


class SeqioSource(Source):
    """A source whose documents TensorFlow reads.

    Attributes:
      vocabulary: that of a Task, None where it has none or text comes without one.
    """

    def __init__(self, spec: str, parts: list[Part], note: str, *, vocabulary: Vocabulary | None = None, **flags: Any):
        super().__init__(spec, parts, note, **flags)
        self.vocabulary = vocabulary

    def describe(self) -> str:
        """One line: the spec, what it is, fingerprint."""
        return f"{self.spec} ({self._note}; fingerprint {self.fingerprint})"


def open_tfds(
    spec: str,
    *,
    text_field: str = "text",
    domain_field: str = "",
    vocabulary: Vocabulary | None = None,
    templates: "Templates | None" = None,
) -> SeqioSource:
    """A set of tensorflow-datasets as documents, in the order of its files.

    The fingerprint is over name, config, version, split and the numbers of examples and bytes of all shards, as
    tfds keeps them; nothing is read for it.

    Args:
      spec: tfds:NAME[/CONFIG][:VERSION][:SPLIT]; SPLIT may be a part, as `train[:10%]`.
      text_field, domain_field: features, with dots into inner ones; a domain may be a string or a class label.
      vocabulary: not used, text needs none.
      templates: makes examples of the features that they name, instead of text.

    Raises:
      UserError: unknown set, one that is not prepared, no such split or field; says what to do.
    """
    if not (match := _TFDS.fullmatch(spec)):
        raise UserError(f"source {spec!r}: write tfds:NAME:SPLIT, as tfds:c4/en:train")
    builder = seqio_tasks.tfds_builder(spec, match["name"])
    info = builder.info
    for name, key in templates.key_of.items() if templates else [(text_field, "text_field")]:
        _feature(spec, info.features, name, key)
    label = _feature(spec, info.features, domain_field, "domain_field") if domain_field else None
    shards = {name: [split.num_bytes, list(split.shard_lengths or [])] for name, split in sorted(info.splits.items())}
    identity = [info.full_name, str(info.version), shards]
    fields = {"text_field": text_field, "domain_field": domain_field, "label": label, "templates": templates}
    read = partial(_read_tfds, builder=builder, **fields)
    parts, examples = [], 0
    for split, use in _splits(spec, match["split"] or "", info.splits):
        try:
            part = info.splits[split]
        except (KeyError, ValueError) as error:
            raise UserError(
                f"source {spec}: {info.full_name} has no split {split!r}{nearest(split, info.splits)}; it has "
                f"{', '.join(sorted(info.splits)) or 'none'}"
            ) from error
        examples += part.num_examples
        size = getattr(part, "num_bytes", 0) or 0
        options = f"{split} {templates.options if templates else text_field} {domain_field}"
        parts.append(
            Part(Path(spec), size, digest(identity), info.name, partial(read, spec=spec, split=split), use, options)
        )
    note = f"{info.full_name}, {examples:,} examples in {builder.data_path}"
    return SeqioSource(spec, parts, note, examples=templates is not None)


def _splits(spec: str, split: str, there: Any) -> list[tuple[str, str | None]]:
    """Which splits are read, and what each is for: None where that is decided by document."""
    if split:
        return [(split, None)]
    if "train" not in there:
        raise UserError(f"source {spec}: it has no split 'train'; add :SPLIT, one of {', '.join(sorted(there))}")
    return [("train", "train"), ("validation", "validation")] if "validation" in there else [("train", None)]


def _feature(spec: str, features: Any, name: str, key: str) -> Any:
    """The feature at `name`, taken literally if it is there, else dot by dot."""
    found = features
    for part in [name] if name in features else name.split("."):
        has = sorted(found) if hasattr(found, "keys") else []
        if part not in has:
            raise UserError(f"source {spec}: no field {name!r}{nearest(part, has)}; it has {has}: set data.{key}")
        found = found[part]
    return found


def _read_tfds(
    path: Path,
    on_bytes: OnBytes,
    *,
    spec: str,
    builder: Any,
    split: str,
    text_field: str,
    domain_field: str,
    label: Any,
    templates: "Templates | None",
) -> Iterator[Document]:
    _, tfds, _ = seqio_tasks.modules(spec)
    one_by_one = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    dataset = builder.as_dataset(split=split, shuffle_files=False, read_config=one_by_one)
    for number, record in enumerate(_records(spec, dataset)):
        where = f"source {spec}, example {number}"
        if templates:
            document = templates.document(record, "", where)
        else:
            document = Document(_string(_value(record, text_field), where, text_field, "text_field"), "")
        on_bytes(len(document.text.encode()) + len(document.prompt.text.encode() if templates else b""))
        domain = ""
        if domain_field:
            domain = _value(record, domain_field)
            known = hasattr(label, "int2str") and np.ndim(domain) == 0 and domain >= 0
            domain = label.int2str(int(domain)) if known else _string(domain, where, domain_field, "domain_field")
        if document.text:
            yield document._replace(domain=domain)


def _records(spec: str, dataset: Any) -> Iterator[dict[str, Any]]:
    """The records of a tf.data.Dataset as numpy; its errors are the user's."""
    _, _, tf = seqio_tasks.modules(spec)
    try:
        yield from dataset.as_numpy_iterator()
    except tf.errors.OpError as error:
        raise UserError(f"source {spec}: cannot be read ({seqio_tasks.reason(error)})") from error


def _value(record: Mapping[str, Any], name: str) -> Any:
    if name in record:
        return record[name]
    return functools.reduce(lambda inner, part: inner[part], name.split("."), record)


def _string(value: Any, where: str, name: str, key: str) -> str:
    if not isinstance(value, bytes):
        raise UserError(f"{where}: field {name!r} is {type(value).__name__}, not a string: set data.{key}")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: field {name!r} is not UTF-8 at byte {error.start}; leave the example out") from error


def open_seqio(
    spec: str, *, text_field: str = "text", domain_field: str = "", vocabulary: Vocabulary | None = None
) -> SeqioSource:
    """A seqio Task, or the Tasks of a Mixture one after the other, as documents.

    Where a Task keeps its text (`text_field`, or "targets_pretokenized" as seqio's `tokenize` leaves it), its
    documents are text; else, and where it has "inputs", ids of its vocabulary ("inputs" before "targets"). The
    fingerprint is over the Task's source with its files' sizes and times, its preprocessors, its vocabulary and
    its first documents; a change behind them that none of this shows goes unseen.

    Args:
      spec: seqio:[package.module/]NAME[:SPLIT].
      text_field: a feature with the text; domain_field: one with the domain, else it is the Task's name.
      vocabulary: of the run, if it is known; for this package's Tasks, and where a Task has none of its own.

    Raises:
      UserError: unknown name or split, a Task that only works with given lengths, another vocabulary than `vocabulary`.
    """
    seqio, _, _ = seqio_tasks.modules(spec)
    provider, split = seqio_tasks.find(spec, vocabulary)
    used = seqio_tasks.vocabulary_of(spec, provider, vocabulary)
    tasks, parts, forms = seqio.get_subtasks(provider), [], set()
    for name, use in _splits(spec, split, provider.splits):
        for task in (task for task in tasks if name in task.splits):
            dataset = _dataset(spec, task, name)
            form = _form(spec, task, dataset, text_field, domain_field)
            forms.add(form[0] is None)
            read = partial(_read_task, spec=spec, dataset=dataset, form=form)
            probe = [_content(document) for document in islice(read(Path(spec), lambda n: None), _PROBED)]
            *identity, features = identify(task, name)
            if form[0] is None:  # text is the same whatever is made of it later
                identity += [features, used.fingerprint if used else ""]
            identity += [form, probe]
            parts.append(Part(Path(spec), 0, digest(identity), task.name, read, use))
    if len(forms) > 1:
        raise UserError(f"source {spec}: some of its Tasks keep their text and some only ids; name one Task")
    pretokenised = forms == {True}
    if pretokenised and used is None:
        raise UserError(
            f"source {spec}: it holds ids, and its features have no vocabulary; set data.vocabulary to the one they "
            "are of"
        )
    if provider.name in seqio_tasks.TASKS and not os.environ.get("SLM_ASSIST_VOCABULARY"):
        used = vocabulary  # bytes stand in where none was given; a better one can be learnt
    kind = "Mixture, rates not applied" if len(tasks) > 1 else "Task"
    note = f"seqio {kind} with {'ids' if pretokenised else 'text'}, {'+'.join(sorted({p.domain for p in parts}))}"
    return SeqioSource(spec, parts, note, vocabulary=used, pretokenised=pretokenised)


def _dataset(spec: str, task: Any, split: str) -> Any:
    """All documents of a Task's split once, whole, in a fixed order."""
    try:
        return task.get_dataset(None, split=split, shuffle=False, seed=0, num_epochs=1, trim_output_features=False)
    except Exception as error:  # preprocessors and sources are anybody's code
        raise UserError(
            f"source {spec}: Task {task.name} gives no whole documents ({type(error).__name__}: "
            f"{seqio_tasks.reason(error)}); if its preprocessors need lengths, set data.stream=true"
        ) from error


def _form(spec: str, task: Any, dataset: Any, text_field: str, domain_field: str) -> tuple[str | None, str, bool]:
    """Where the text is (None: there are ids), where the domain is, and whether ids have inputs before them."""
    _, _, tf = seqio_tasks.modules(spec)
    there = dataset.element_spec

    def is_text(name: str) -> bool:
        return name in there and there[name].dtype == tf.string and there[name].shape.rank == 0

    if domain_field and not is_text(domain_field):
        raise UserError(
            f"source {spec}: Task {task.name} has no string {domain_field!r} but {sorted(there)}: set data.domain_field"
        )
    has_inputs = "inputs" in task.output_features
    text = next((name for name in (text_field, "targets_pretokenized") if is_text(name) and not has_inputs), None)
    return text, domain_field, has_inputs


def _read_task(
    path: Path, on_bytes: OnBytes, *, spec: str, dataset: Any, form: tuple[str | None, str, bool]
) -> Iterator[Document]:
    text_field, domain_field, has_inputs = form
    for number, record in enumerate(_records(spec, dataset)):
        where = f"source {spec}, example {number}"
        domain = _string(record[domain_field], where, domain_field, "domain_field") if domain_field else ""
        if text_field:
            text = _string(record[text_field], where, text_field, "text_field")
            on_bytes(len(text.encode()))
            if text:
                yield Document(text, domain)
        else:
            ids = np.concatenate([record["inputs"], record["targets"]]) if has_inputs else record["targets"]
            on_bytes(ids.nbytes)
            if ids.size:
                yield Document("", domain, ids=ids)


def identify(task: Any, split: str) -> list[Any]:
    """What tells a Task from another without reading its data: source, files, preprocessors, features."""
    source = task.source
    try:
        files = [os.fspath(name) for name in source.list_shards(split)]
    except Exception:  # not every source has files
        files = []
    stats = [[file, os.path.getsize(file), os.stat(file).st_mtime_ns] for file in files if os.path.isfile(file)]
    functions = [*task.preprocessors, *filter(None, [getattr(source, "_dataset_fn", None)])]
    features = {
        name: [str(feature.vocabulary), feature.vocabulary.vocab_size, bool(feature.add_eos)]
        for name, feature in sorted(task.output_features.items())
    }
    said = re.sub(r"0x[0-9a-f]+", "", repr(source))
    return [task.name, split, said, files, stats, [_describe(function) for function in functions], features]


def _describe(value: Any) -> Any:
    """A function by its name, arguments and code, so that an edit shows; other things by their text."""
    if isinstance(value, partial):
        arguments = [_describe(x) for x in value.args], {k: _describe(x) for k, x in sorted(value.keywords.items())}
        return [_describe(value.func), *arguments]
    if isinstance(value, types.CodeType):
        return [value.co_code.hex(), [_describe(constant) for constant in value.co_consts], list(value.co_names)]
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    if isinstance(value, Callable) and hasattr(value, "__code__"):
        return [value.__module__, value.__qualname__, _describe(value.__code__)]
    return re.sub(r"0x[0-9a-f]+", "", repr(value))


def _content(document: Document) -> str:
    ids = b"" if document.ids is None else np.ascontiguousarray(document.ids, "<i8").tobytes()
    return hashlib.blake2b(document.text.encode() + ids, digest_size=16).hexdigest()


def digest(value: Any) -> str:
    """Hex, over a value of plain types."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
