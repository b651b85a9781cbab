#!/usr/bin/env bash
# A command for each row of the paper's tables, and for the CRD protocol's pairs on CIFAR-100.
#
#   bash examples/paper/rows.sh                                     # lists the rows
#   bash examples/paper/rows.sh nkd-resnet18                        # runs one
#   LAUNCH=echo bash examples/paper/rows.sh all                     # prints their commands
#   LAUNCH="torchrun --nproc-per-node 8" IMAGENET=/data/imagenet bash examples/paper/rows.sh uskd-resnet50
#
# After the commands: the authors' top-1 in %, baseline -> with the method (arXiv 2303.13005 and its official repository).
# We ran none of them; README.md in this folder has our own measurements.
set -euo pipefail
LAUNCH=${LAUNCH:-python}
IMAGENET=${IMAGENET:-/imagenet}
WANTED=" $* "
FOUND=0

row() { # name flags...
	if [[ "$WANTED" == "  " ]]; then
		echo "$1"
	elif [[ "$WANTED" == *" $1 "* || "$WANTED" == " all " ]]; then
		FOUND=1
		$LAUNCH train.py "${@:2}" --output "runs/paper/$1"
	fi
}
cnn() { row "$1" --data "$IMAGENET" --recipe imagenet-cnn "${@:2}"; }
vit() { row "$1" --data "$IMAGENET" --recipe imagenet-vit "${@:2}"; }
cifar() { row "$1" --data cifar100 --recipe cifar "${@:2}"; }
crd() { # name model flags...: the last epoch counts
	row "$1" --data cifar100 --recipe crd --model "examples/paper/cifar_models.py:$2" "${@:3}"
}

# NKD on ImageNet
cnn nkd-resnet18 --model resnet18 --kd nkd --teacher resnet34                           # 69.90 -> 71.96
cnn nkd-mobilenet --model mobilenetv1_100 --kd nkd --teacher resnet50 --clip-grad 5     # 69.21 -> 72.58
vit nkd-deit-tiny --model deit_tiny_patch16_224 --kd nkd \
	--teacher deit3_small_patch16_224.fb_in22k_ft_in1k                                  # 74.42 -> 76.68
vit nkd-deit-base --model deit_base_patch16_224 --kd nkd \
	--teacher deit3_large_patch16_224.fb_in22k_ft_in1k                                  # 81.76 -> 84.96

# USKD on ImageNet. Three baselines have other schedules (ShuffleNetV2's is linear; here it is a cosine).
cnn uskd-mobilenet --self-kd uskd --model mobilenetv1_100                               # 69.21 -> 70.38
row uskd-mobilenet-v2 --data "$IMAGENET" --recipe imagenet-mobilenet --self-kd uskd --model mobilenet_v2 # 71.86 -> 72.41
cnn uskd-shufflenet-v2 --self-kd uskd --model shufflenet_v2_x1_0 --epochs 300 --batch-size 1024 --lr 0.5 \
	--weight-decay 4e-5 --schedule cosine --warmup-epochs 4                             # 69.55 -> 70.30
cnn uskd-resnet18 --self-kd uskd --model resnet18                                       # 69.90 -> 70.79
cnn uskd-resnet50 --self-kd uskd --model resnet50                                       # 76.55 -> 77.07
cnn uskd-resnet101 --self-kd uskd --model resnet101                                     # 77.97 -> 78.54
cnn uskd-regnet --self-kd uskd --model regnet_x_1_6gf --batch-size 1024 --opt sgd --lr 0.8 --weight-decay 5e-5 \
	--schedule cosine --warmup-epochs 5                                                 # 76.84 -> 77.30
vit uskd-swin-tiny --self-kd uskd --model swin_t                                        # 81.18 -> 81.49
vit uskd-deit-tiny --self-kd uskd --model deit_tiny_patch16_224                         # 74.42 -> 74.97

# CIFAR-100
cifar teacher-resnet34 --model resnet34
cifar nkd-cifar-resnet18 --model resnet18 --kd nkd --teacher runs/paper/teacher-resnet34/student
cifar uskd-cifar-resnet18 --model resnet18 --self-kd uskd                               # 78.58 -> 79.90

# The CRD protocol on CIFAR-100: teachers, seven pairs of the same style, four mixed pairs
for teacher in wrn_40_2 resnet56 resnet110 resnet32x4 vgg13; do
	crd "teacher-$teacher" $teacher
done
pair() { crd "nkd-$1-$2" "$2" --kd nkd --teacher "runs/paper/teacher-$1/student" --model-file "examples/paper/cifar_models.py:$1" "${@:3}"; }
pair wrn_40_2 wrn_16_2
pair wrn_40_2 wrn_40_1
pair resnet56 resnet20
pair resnet110 resnet20
pair resnet110 resnet32
pair resnet32x4 resnet8x4
pair vgg13 vgg8
pair vgg13 mobilenet_v2_half --lr 0.01
pair resnet32x4 shufflenet_v1 --lr 0.01
pair resnet32x4 shufflenet_v2 --lr 0.01
pair wrn_40_2 shufflenet_v1 --lr 0.01

if [[ "$WANTED" != "  " && $FOUND == 0 ]]; then
	echo "rows.sh: error: no row named$WANTED: without a name rows.sh lists them" >&2
	exit 2
fi
