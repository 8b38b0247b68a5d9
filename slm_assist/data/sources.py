"""Where text comes from: every kind of source by the name that a config gives it."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_assist.data import columnar, pretokenised, text_files
from slm_assist.data.documents import Document, OnBytes, Part, Source
from slm_assist.data.paths import digests, find
from slm_assist.data.python_source import python_files
from slm_assist.data.tokenizers import Vocabulary
from slm_assist.errors import UserError, nearest

if TYPE_CHECKING:
    from slm_assist.data.templates import Templates

__all__ = ["Document", "OnBytes", "Part", "Source", "is_pretokenised", "open_source"]

PILE_DOMAIN_FIELD = "meta.pile_set_name"
PYTHON_VALIDATION_FRACTION = 0.03
_READ_RECORDS = {
    "jsonl": text_files.read_jsonl,
    "parquet": columnar.read_parquet,
    "array_record": columnar.read_array_record,
}
_PRETOKENISED = ("nanogpt", "megatron")
_WITH_FIELDS = (*_READ_RECORDS, "tfds")
KINDS = ("text", "jsonl", "pile", "python", "parquet", "array_record", *_PRETOKENISED, "tfds", "seqio")


def open_source(
    spec: str,
    *,
    text_field: str = "text",
    domain_field: str = "",
    validation_fraction: float = PYTHON_VALIDATION_FRACTION,
    cache_dir: str | Path | None = None,
    vocabulary: Vocabulary | None = None,
    templates: "Templates | None" = None,
) -> Source:
    """Finds a source's files and fingerprints them.

    Args:
      spec: one of
        `text:GLOB[,GLOB...]`  UTF-8 files. A long one is cut into documents of about 4 KB, at blank lines
          where there are any; together they are the file. Domain: the folder's name if there are several
          folders, else the file's name if there are 2 to 20 files, else "text".
        `jsonl:GLOB[,GLOB...]`  one JSON object a line, plain, .gz, .xz or .zst; blank lines and empty texts
          are skipped.
        `pile:GLOB[,GLOB...]`  the same in the Pile's form: the field `text`, domains in `meta.pile_set_name`.
        `parquet:GLOB[,GLOB...]`  a column with the text, perhaps one with the domain (FineWeb-Edu's files).
        `array_record:GLOB[,GLOB...]`  records of JSON, of tf.train.Example, or of text alone.
        `nanogpt:GLOB[,GLOB...]`  ids as nanoGPT, modded-nanogpt and llm.c write them.
        `megatron:PREFIX[,PREFIX...]`  ids in PREFIX.bin and PREFIX.idx; with several, each is a domain.
        `python:`  the Python sources of the standard library, jax, flax, numpy, scipy and optax.
        `tfds:` and `seqio:`  see seqio_source.py.
        `package.module:function`  your own: it takes nothing and gives an iterator of `Document`, the same
          each time. `function.fingerprint` (a string, or a function of nothing that gives one) must change
          when the documents do. Optional: `function.splits = True` if each document has its split,
          `function.pretokenised = True` if documents have ids, `function.examples = True` if they have prompts.
        `~` and `**` work in globs; the files of a glob come in sorted order. Files may be in buckets (gs://).
      text_field, domain_field: of records, where text and domain stand; dots lead into inner objects
        (`meta.pile_set_name`). Without a `domain_field` the domain is the kind of the source.
      validation_fraction: of `python:`, about which part of each domain is for validation.
      cache_dir: remembers there the hashes of files that have not changed (by size and time of change).
      vocabulary: what the ids of pre-tokenised sources mean; text needs none.
      templates: makes examples, prompts and answers, of records that have fields.

    Raises:
      UserError: unknown kind, no file matches, an empty file, one that cannot be read, ids without a vocabulary.
    """
    kind, colon, rest = spec.partition(":")
    if not colon or (kind not in KINDS and not _names_a_function(kind, rest)):
        hint = nearest(kind, KINDS) if colon else f" (did you mean text:{spec}?)"
        raise UserError(
            f"source {spec!r}: write KIND:GLOB with one of {', '.join(KINDS)}, or package.module:function{hint}"
        )
    if templates:
        check_has_fields(spec)
    if kind in _PRETOKENISED and vocabulary is None:
        raise UserError(f"source {spec}: it holds ids, not text; set data.vocabulary to the vocabulary they are of")
    if kind == "python":
        return _python(spec, validation_fraction)
    if kind in ("tfds", "seqio"):
        from slm_assist.data import seqio_source

        options = {"text_field": text_field, "domain_field": domain_field, "vocabulary": vocabulary}
        if kind == "tfds":
            return seqio_source.open_tfds(spec, **options, templates=templates)
        return seqio_source.open_seqio(spec, **options)
    if kind not in KINDS:
        return _custom(spec)
    if kind == "megatron":
        return _megatron(spec, rest, cache_dir, vocabulary)
    paths = find(spec, rest)
    known = digests(paths, cache_dir)
    if kind == "text":
        domains = _text_domains(paths)
        parts = [Part(p, *known[p], d, text_files.read_text) for p, d in zip(paths, domains, strict=True)]
        return Source(spec, parts)
    if kind == "nanogpt":
        read = partial(pretokenised.read_nanogpt, vocabulary=vocabulary)
        return Source(spec, [Part(p, *known[p], kind, read) for p in paths], pretokenised=True)
    if kind == "pile":
        kind, text_field, domain_field = "jsonl", "text", PILE_DOMAIN_FIELD
    read = partial(_READ_RECORDS[kind], text_field=text_field, domain_field=domain_field, templates=templates)
    options = f"{templates.options if templates else text_field} {domain_field}"
    parts = [Part(p, *known[p], kind, read, options=options) for p in paths]
    return Source(spec, parts, examples=templates is not None)


def check_has_fields(spec: str, key: str = "source") -> None:
    """Raises `UserError` unless the records of a source of this name have fields to make examples of."""
    if spec.partition(":")[0] not in _WITH_FIELDS:
        raise UserError(
            f"{key}={spec}: data.prompt and data.answer need records with fields: use "
            f"{', '.join(f'{kind}:' for kind in _WITH_FIELDS)} or a function that gives examples, without templates"
        )


def is_pretokenised(spec: str) -> bool:
    """Whether a source of this name needs `open_source`'s vocabulary, as far as the name alone tells."""
    return spec.partition(":")[0] in _PRETOKENISED


def _names_a_function(module: str, function: str) -> bool:
    """Whether it reads like package.module:function and not like a kind that is misspelt."""
    identifiers = all(part.isidentifier() for part in [*module.split("."), *function.split(".")])
    return identifiers and ("." in module or not nearest(module, KINDS))


def _python(spec: str, validation_fraction: float) -> Source:
    files, skipped = python_files(validation_fraction)
    parts = [Part(f.path, f.size, f.digest.hex(), f.domain, text_files.read_whole, f.split) for f in files]
    return Source(spec, parts, f"{skipped} not UTF-8 and left out")


def _text_domains(paths: list[Path]) -> list[str]:
    if len({path.parent for path in paths}) > 1:
        return [path.resolve().parent.name for path in paths]
    return [path.stem if 2 <= len(paths) <= 20 else "text" for path in paths]


def _megatron(spec: str, prefixes: str, cache_dir: str | Path | None, vocabulary: Vocabulary) -> Source:
    names = [name.strip().removesuffix(".bin").removesuffix(".idx") for name in prefixes.split(",") if name.strip()]
    indexes = find(spec, ",".join(f"{name}.idx" for name in names))
    data = find(spec, ",".join(str(path.with_suffix(".bin")) for path in indexes))
    known = digests([*data, *indexes], cache_dir)
    read = partial(pretokenised.read_megatron, vocabulary=vocabulary)
    parts = []
    for path, index in zip(data, indexes, strict=True):
        (size, digest), (index_size, index_digest) = known[path], known[index]
        domain = path.stem if len(data) > 1 else "megatron"
        parts.append(Part(path, size + index_size, f"{digest} {index_digest}", domain, read))
    return Source(spec, parts, pretokenised=True)


def _custom(spec: str) -> Source:
    from slm_assist.plugins import check_parameters, load

    function = load("data.source", spec)
    check_parameters("data.source", spec, function)
    fingerprint = getattr(function, "fingerprint", None)
    fingerprint = fingerprint() if callable(fingerprint) else fingerprint
    if not isinstance(fingerprint, str) or not fingerprint:
        name = spec.partition(":")[2]
        raise UserError(f"data.source={spec}: set {name}.fingerprint to a string that changes when the documents do")
    flags = {name: bool(getattr(function, name, False)) for name in ("splits", "pretokenised", "examples")}
    read = partial(
        _read_custom, spec=spec, function=function, pretokenised=flags["pretokenised"], examples=flags["examples"]
    )
    return Source(spec, [Part(Path(spec), 0, fingerprint, spec.partition(":")[2], read)], **flags)


def _read_custom(
    path: Path,
    on_bytes: OnBytes,
    spec: str,
    function: Callable[[], Iterator[Document]],
    pretokenised: bool,
    examples: bool,
) -> Iterator[Document]:
    """The documents of a user's function, checked for what would otherwise fail far from here."""
    for number, document in enumerate(_given(spec, function)):
        where = f"source {spec}, document {number}"
        wanted = "with ids" if pretokenised else "with a prompt" if examples else "with a text"
        has = isinstance(document, Document) and (document.ids is not None, document.prompt is not None)
        if has != (pretokenised, examples):
            raise UserError(f"{where}: {_short(document)} is no slm_assist.data.sources.Document {wanted}")
        if not isinstance(document.text, str) or not isinstance(document.domain, str):
            raise UserError(f"{where}: text and domain must be strings")
        if document.split not in (None, "train", "validation"):
            raise UserError(f"{where}: split {document.split!r}; give 'train', 'validation' or None")
        try:
            (document.text + (document.prompt.text if examples else "")).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: half a surrogate pair at {error.start}; mend it") from error
        if document.text or pretokenised:
            yield document


def _given(spec: str, function: Callable[[], Iterator[Document]]) -> Iterator[Any]:
    """What a user's function gives; its own mistakes in one line."""
    try:
        yield from function()
    except UserError:
        raise
    except Exception as error:
        words = (str(error).splitlines() or [""])[0]
        raise UserError(f"data.source={spec!r}: the function fails: {type(error).__name__}: {words}") from error


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
