"""Tunix (Google): its trainers on its own Llama; roles "plain" and "assisted".

"plain" is `PeftTrainer` with its default loss over all parameters, "assisted" is `DistillationTrainer` with
`LogitStrategy`, both through `train`, as the project's examples do it. Batches lie in memory; steps are timed in the
iterator that hands them to `train`, so its logging is in the figures, and there is neither progress bar nor
checkpoint. Parameters are in the compute dtype, as its examples load them.
"""

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import protocol

PACKAGES = ("google-tunix", "jax", "jaxlib", "flax", "optax")


def main() -> None:
    task = protocol.begin()
    import jax
    import numpy as np
    from flax import nnx
    from tunix.distillation import distillation_trainer

    if task.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    trainer = make_trainer(task)
    tokens = np.random.default_rng(0).integers(0, task.vocab_size, (task.rows, task.seq_len)).astype(np.int32)
    example = distillation_trainer.TrainingInput(input_tokens=tokens, input_mask=np.ones_like(tokens, dtype=bool))

    def status() -> Mapping[str, Any]:
        logged = trainer.metrics_logger
        loss = float(logged.get_metric("", "loss", "train")) if logged.metric_exists("", "loss", "train") else None
        stats = jax.devices()[0].memory_stats() or {}
        return {"loss": loss, "device_bytes": stats.get("peak_bytes_in_use")}

    def batches() -> Iterator[Any]:
        for count in protocol.requests({name: version(name) for name in PACKAGES}, status):
            for _ in range(count):
                yield example
            jax.block_until_ready(nnx.state(trainer.model))

    trainer.train(batches())


def make_trainer(task: protocol.Task) -> Any:
    """The trainer of the task's role."""
    import jax
    import optax
    from tunix.distillation import distillation_trainer, strategies
    from tunix.sft import peft_trainer, utils

    optimizer = optax.chain(
        optax.clip_by_global_norm(protocol.CLIP_NORM),
        optax.adamw(
            protocol.LEARNING_RATE,
            b1=protocol.B1,
            b2=protocol.B2,
            eps=protocol.EPS,
            weight_decay=protocol.WEIGHT_DECAY,
        ),
    )

    def inputs(example: Any) -> dict[str, Any]:
        return {
            "input_tokens": example.input_tokens,
            "input_mask": example.input_mask,
            "positions": utils.build_positions_from_mask(example.input_mask),
            "attention_mask": utils.make_causal_attn_mask(example.input_mask),
        }

    student = make_model(task, task.student, 0)
    if task.role == "plain":
        config = peft_trainer.TrainingConfig(eval_every_n_steps=10**9)
        return peft_trainer.PeftTrainer(student, optimizer, config).with_gen_model_input_fn(inputs)

    def logits(model, input_tokens, input_mask, positions, attention_mask):
        return model(input_tokens, positions, None, attention_mask)[0][:, :-1]

    def one_hot_labels(input_tokens, input_mask, **_):
        found = jax.nn.one_hot(input_tokens[:, 1:], task.vocab_size)
        return found * input_mask[:, 1:, None].astype(found.dtype)

    teacher = make_model(task, task.teacher, 1)
    teacher.eval()
    student.train()
    strategy = strategies.LogitStrategy(
        student_forward_fn=logits,
        teacher_forward_fn=logits,
        labels_fn=one_hot_labels,
        temperature=1.0,
        alpha=protocol.SOFT_WEIGHT,
    )
    config = distillation_trainer.TrainingConfig(eval_every_n_steps=10**9)
    trainer = distillation_trainer.DistillationTrainer(student, teacher, strategy, optimizer, config)
    return trainer.with_gen_model_input_fn(inputs)


def make_model(task: protocol.Task, shape: Mapping[str, Any], seed: int) -> Any:
    """Tunix's Llama of a shape, with tied embeddings, in the compute dtype."""
    import jax
    from flax import nnx
    from tunix.models.llama3 import model as llama

    config = llama.ModelConfig(
        num_layers=shape["num_layers"],
        vocab_size=shape["vocab_size"],
        embed_dim=shape["d_model"],
        hidden_dim=shape["d_ff"],
        num_heads=shape["num_heads"],
        head_dim=shape["head_dim"],
        num_kv_heads=shape["num_kv_heads"],
        rope_theta=10000,
        norm_eps=1e-6,
        weight_tying=True,
    )
    model = llama.Llama3(config, rngs=nnx.Rngs(params=seed))
    nnx.update(model, jax.tree.map(lambda x: x.astype(task.dtype), nnx.state(model)))
    return model


if __name__ == "__main__":
    main()
