"""Package metadata. The core needs no TensorFlow; the extras say what each door needs."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "jax>=0.10",
    "flax>=0.12",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.11.30",
    "ml-collections>=1.0",
    "sentencepiece>=0.2.1",
    "numpy>=2.0",
    "tqdm>=4.66",
    "tensorboardX>=2.6",
    "matplotlib>=3.9",
    "pandas>=2.2",
    "zstandard>=0.23",
    "tokenizers>=0.21",
    "etils[epath]>=1.12",
]
EXTRAS = {
    # seqio and tfds bring TensorFlow; pyarrow and array_record read Parquet and ArrayRecord
    "data": [
        "seqio>=0.0.20",
        "tensorflow-datasets>=4.9.9",
        "importlib_resources",
        "pyarrow>=18",
        "array_record>=0.8",
    ],
    # Beam holds protobuf below 7, and SentencePiece 0.2.3 needs it above
    "beam": ["apache-beam>=2.70", "sentencepiece<0.2.3"],
    "gpu": ["jax[cuda13]>=0.10"],
    "tpu": ["jax[tpu]>=0.10"],
    # Downloads from the hub; and what loads an export, for which transformers wants torch too
    "hf": ["huggingface_hub>=0.30", "safetensors>=0.5", "transformers>=5"],
    # The EleutherAI harness, the first with TyDiQA; without its own models it needs no torch
    "eval": ["lm_eval>=0.4.13"],
}
# What imported models and the harness are compared with; torch is the one that this was tested with
REFERENCES = ["torch==2.13.0", "accelerate>=1"]
EXTRAS["all"] = [package for name in ("data", "beam", "hf", "eval") for package in EXTRAS[name]]
EXTRAS["test"] = ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.12", *REFERENCES, *EXTRAS["all"]]

setup(
    name="slm_assist",
    version="0.1.0",
    description="Train large language models faster and better with a small one (SALT), in JAX and Flax",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["slm_assist", "slm_assist.*"]),
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["slm-assist=slm_assist.cli:main"]},
)
