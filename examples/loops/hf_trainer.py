"""Train a ViT with NKD and with USKD in Hugging Face's Trainer. The flags are the Trainer's.

python examples/loops/hf_trainer.py --output_dir OUTPUT
torchrun --nproc-per-node 2 examples/loops/hf_trainer.py --output_dir OUTPUT --per_device_train_batch_size 32
"""

import copy

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch.nn import functional as F
from transformers import HfArgumentParser, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed
from transformers.trainer_utils import get_last_checkpoint

from kdlite import WithWeakHead, nkd_loss, uskd_loss


class NKDTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]  # read now, because the Trainer's own loss may remove them
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            with torch.no_grad():
                teacher_logits = teacher(inputs["pixel_values"]).logits
            kd_loss = nkd_loss(outputs.logits, teacher_logits, labels, reduction="sum")
            loss = loss + kd_loss * self.accelerator.num_processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


class USKDTrainer(Trainer):  # the model is WithWeakHead(...)
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")
        logits, weak_logits = model(**inputs)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        loss = loss + uskd_loss(logits, weak_logits, labels, reduction="sum", group=dist.group.WORLD)
        # num_items_in_batch counts the targets of a step on all processes; DDP averages over the processes
        return loss * self.accelerator.num_processes / num_items_in_batch


def vit(width: int) -> ViTForImageClassification:
    sizes = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4, num_attention_heads=4)
    images = dict(image_size=8, patch_size=4, num_channels=1, num_labels=10)
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return ViTForImageClassification(ViTConfig(**sizes, **images, **dropout))


digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # (1797, 1, 8, 8)
data = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, digits.target)]


def accuracy(p) -> dict[str, float]:
    return {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())}


def fit(trainer_class, model, args: TrainingArguments, folder: str) -> None:
    args = copy.copy(args)
    args.output_dir = f"{args.output_dir}/{folder}"  # a folder of checkpoints for each model
    sets = dict(train_dataset=data[:1408], eval_dataset=data[1408:])
    trainer = trainer_class(model, args, **sets, compute_metrics=accuracy)
    trainer.train(get_last_checkpoint(args.output_dir) if args.resume_from_checkpoint else None)
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        print(f"{trainer_class.__name__:<12} {metrics['eval_accuracy']:.1%}, loss {metrics['eval_loss']:.3f}")


if __name__ == "__main__":
    parser = HfArgumentParser(TrainingArguments)
    parser.set_defaults(output_dir="runs/hf", num_train_epochs=2, learning_rate=3e-3, save_strategy="no")
    parser.set_defaults(per_device_train_batch_size=64, per_device_eval_batch_size=128, report_to="none", use_cpu=True)
    parser.set_defaults(disable_tqdm=True, logging_strategy="no")
    # without these two settings, the Trainer guesses the labels and the inputs from the parameters of forward()
    parser.set_defaults(remove_unused_columns=False, label_names=["labels"])
    (args,) = parser.parse_args_into_dataclasses()
    set_seed(0)
    teacher, student = vit(96), vit(48)
    student_with_head = WithWeakHead(vit(48), example_input=images[:2])
    fit(Trainer, teacher, args, "teacher")
    teacher.eval().requires_grad_(False)
    fit(NKDTrainer, student, args, "nkd")
    student.save_pretrained(f"{args.output_dir}/nkd")
    fit(USKDTrainer, student_with_head, args, "uskd")
    student_with_head.close().save_pretrained(f"{args.output_dir}/uskd")  # from_pretrained reads it
