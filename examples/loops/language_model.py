"""Train a language model of Hugging Face with NKD from logits, hidden states, or the top-k of a served teacher.

python examples/loops/language_model.py
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from kdlite import nkd_linear_loss, nkd_loss

text = Path(__file__).read_bytes()  # tokens are bytes
VOCABULARY = 128


def llama(width: int, vocabulary: int) -> nn.Module:
    sizes = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes))


def batch(n: int = 8, length: int = 64) -> tuple[Tensor, Tensor]:
    """Return tokens (N, L) and labels; the label -100 marks ignored positions, here the first half."""
    start = torch.randint(len(text) - length, (n,)).tolist()
    tokens = torch.tensor([list(text[i : i + length]) for i in start])
    return tokens, torch.where(torch.arange(length) < length // 2, -100, tokens)


def cross_entropy(tokens: Tensor, labels: Tensor) -> Tensor:
    return student(tokens, labels=labels).loss


def from_logits(tokens: Tensor, labels: Tensor) -> Tensor:
    """Return the loss from logits. The classes are in dimension 1, without the teacher's padding classes."""
    with torch.no_grad():
        teacher_logits = teacher(tokens).logits[:, :-1, :VOCABULARY].transpose(1, 2)
    logits = student(tokens).logits[:, :-1].transpose(1, 2)  # (N, V, L - 1)
    return F.cross_entropy(logits, labels[:, 1:]) + nkd_loss(logits, teacher_logits, labels[:, 1:])


def from_hidden(tokens: Tensor, labels: Tensor) -> Tensor:
    """Return the same loss from hidden states, without all logits in memory."""
    with torch.no_grad():
        teacher_hidden = teacher.model(tokens).last_hidden_state[:, :-1]
    hidden = student.model(tokens).last_hidden_state[:, :-1]
    weight, teacher_weight = student.lm_head.weight, teacher.lm_head.weight[:VOCABULARY]
    return nkd_linear_loss(hidden, weight, teacher_hidden, teacher_weight, labels[:, 1:], ce_weight=1.0)


def from_top_k(tokens: Tensor, labels: Tensor, k: int = 20) -> Tensor:
    """Return the loss from a server's log-probabilities of the text's tokens and of the k most probable tokens."""
    with torch.no_grad():
        logprobs = teacher(tokens).logits[:, :-1, :VOCABULARY].log_softmax(-1)
        own, (served, index) = logprobs.gather(2, tokens[:, 1:, None]).squeeze(2), logprobs.topk(k)
    hidden, weight = student.model(tokens).last_hidden_state[:, :-1], student.lm_head.weight
    return nkd_linear_loss(hidden, weight, None, None, labels[:, 1:], teacher_top_k=(own, served, index), ce_weight=1.0)


def fit(model: nn.Module, loss_of, steps: int = 30) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = loss_of(*batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    torch.manual_seed(0)
    teacher = llama(64, VOCABULARY + 16).eval()  # 16 padding classes, as in many vocabularies
    fit(teacher, lambda tokens, labels: teacher(tokens, labels=tokens).loss, steps=80)
    for loss_of in (cross_entropy, from_logits, from_hidden, from_top_k):
        torch.manual_seed(0)
        student = llama(32, VOCABULARY)
        fit(student, loss_of)
        with torch.no_grad():
            print(f"{loss_of.__name__:<14} cross-entropy {cross_entropy(*batch(64)):.2f}")
