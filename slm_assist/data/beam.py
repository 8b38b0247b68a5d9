"""Preparing a corpus as an Apache Beam pipeline: one element a part, and the merge at the end.

Thin, since parts need nothing of each other. The workers and the machine that merges see the same cache
directory (a shared disk).
"""

from collections.abc import Callable, Sequence
from typing import Any

from slm_assist.errors import UserError


def prepare(make: Callable[..., Any], parts: int, arguments: Sequence[str] = ()) -> None:
    """Runs `make(part=(i, parts))` for every i on Beam's workers, then `make()`, which merges.

    Args:
      make: `rows.prepare` with its other arguments bound, as by functools.partial; it goes to the workers, so
        Beam must be able to serialise it.
      parts: how many; a few for each worker.
      arguments: Beam's options, as ["--runner=DataflowRunner", "--project=..."]; none runs on this machine.

    Raises:
      UserError: Apache Beam is not installed, or `parts` is below 1.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError("preparing with Beam needs apache_beam: pip install apache-beam") from error
    if parts < 1:
        raise UserError(f"--beam={parts}: use at least 1 part")

    def make_part(i: int) -> int:
        make(part=(i, parts))
        return i

    try:
        pipeline = beam.Pipeline(options=PipelineOptions(list(arguments)))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--beam_options={' '.join(arguments)}: {str(error).splitlines()[0]}") from error
    with pipeline:
        _ = (
            pipeline
            | "parts" >> beam.Create(range(parts))
            | "spread" >> beam.Reshuffle()
            | "prepare" >> beam.Map(make_part)
            | "all" >> beam.combiners.Count.Globally()
            | "merge" >> beam.Map(lambda _: make() and None)
        )
