"""TRL (Hugging Face) on transformers' Llama in a plain PyTorch step.

Roles:
  plain        next-token loss of `LlamaForCausalLM`
  gkd          `GKDTrainer.generalized_jsd_loss` with beta=0, forward KL, as its `compute_loss` calls it
  chunked      the loss that TRL's newer `DistillationTrainer` computes from hidden states, beta=0
  liger_plain  as `plain`, with Liger's kernels (GPU only)
  liger        Liger's fused linear JSD with beta=0 from hidden states, and its kernels in the models (GPU only)

Beside the peers' own loss nothing is added: TRL has no cross-entropy term. AdamW is PyTorch's fused one. In bfloat16
the student has float32 parameters under autocast and the teacher bfloat16 ones, as Hugging Face's Trainer does it.
The GPU roles and bfloat16 have not been run yet.
"""

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import protocol

LIGER_ROLES = ("liger_plain", "liger")
PACKAGES = ("trl", "torch", "transformers")


def main() -> None:
    task = protocol.begin()
    import torch

    torch.set_num_threads(len(task.cores))
    device = "cuda" if task.device == "gpu" else "cpu"
    if task.role in LIGER_ROLES:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    torch.manual_seed(0)
    student = make_model(task.student).to(device).train()
    teacher = None
    if task.role not in ("plain", "liger_plain"):
        teacher = make_model(task.teacher).to(device, getattr(torch, task.dtype)).eval().requires_grad_(False)
    loss_of = make_loss(task.role, student, teacher)
    tokens = torch.randint(0, task.vocab_size, (task.rows, task.seq_len), device=device)
    optimizer = torch.optim.AdamW(
        student.parameters(),
        lr=protocol.LEARNING_RATE,
        betas=(protocol.B1, protocol.B2),
        eps=protocol.EPS,
        weight_decay=protocol.WEIGHT_DECAY,
        fused=True,
    )
    loss = torch.zeros(())

    def status() -> Mapping[str, Any]:
        return {"loss": loss.item(), "device_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None}

    for count in protocol.requests({name: version(name) for name in PACKAGES}, status):
        for _ in range(count):
            with torch.autocast(device, torch.bfloat16, enabled=task.dtype == "bfloat16"):
                loss = loss_of(tokens)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), protocol.CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()
            loss = loss.detach()
        if device == "cuda":
            torch.cuda.synchronize()


def make_model(shape: Mapping[str, Any]) -> Any:
    """transformers' Llama of a shape, with tied embeddings, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["d_model"],
        intermediate_size=shape["d_ff"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_loss(role: str, student: Any, teacher: Any) -> Callable[[Any], Any]:
    """tokens [B, T] -> the mean loss of a role over the B (T - 1) next tokens."""
    import torch

    if role in ("plain", "liger_plain"):
        return lambda tokens: student(input_ids=tokens, labels=tokens).loss

    def hidden_and_heads(tokens):
        """Of both models, in the teacher's dtype."""
        with torch.no_grad():
            taught = teacher.model(input_ids=tokens).last_hidden_state[:, :-1]
        hidden = student.model(input_ids=tokens).last_hidden_state[:, :-1]
        return hidden.to(taught.dtype), student.lm_head.weight.to(taught.dtype), taught, teacher.lm_head.weight

    if role == "gkd":
        from trl.experimental.gkd import GKDTrainer

        def gkd(tokens):
            student_logits = student(input_ids=tokens).logits[:, :-1]
            with torch.no_grad():
                teacher_logits = teacher(input_ids=tokens).logits[:, :-1]
            return GKDTrainer.generalized_jsd_loss(student_logits, teacher_logits, labels=tokens[:, 1:], beta=0.0)

        return gkd
    if role == "chunked":
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        def chunked(tokens):
            hidden, head, taught, taught_head = hidden_and_heads(tokens)
            counted = torch.ones_like(tokens[:, 1:])
            return _chunked_divergence_loss(hidden, taught, head, taught_head, counted, beta=0.0)[0]

        return chunked
    from liger_kernel.transformers import LigerFusedLinearJSD

    divergence = LigerFusedLinearJSD(jsd_beta=0.0)

    def liger(tokens):
        hidden, head, taught, taught_head = hidden_and_heads(tokens)
        return divergence(hidden.flatten(0, 1), head, taught.flatten(0, 1), taught_head, tokens[:, 1:].flatten())

    return liger


if __name__ == "__main__":
    main()
