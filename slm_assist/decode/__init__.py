"""Text from a model: sampling with a cache of keys and values.

from slm_assist import pretrained
from slm_assist.decode import Generator, Sampling
loaded = pretrained.load("runs/salt")
generator = Generator(loaded.model, loaded.params, loaded.vocabulary, stop_ids=loaded.stop_ids)
(text,) = generator.generate(["def main("], max_tokens=64, sampling=Sampling(temperature=0.8, top_p=0.95))
"""

from slm_assist.decode.generate import Generator, Speed
from slm_assist.decode.sampling import Sampling, sample

__all__ = ["Generator", "Sampling", "Speed", "sample"]
