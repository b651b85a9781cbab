#!/usr/bin/env bash
# Run a command for a row of the paper's tables, or for a pair of the CRD protocol on CIFAR-100.
#
#   bash examples/paper/rows.sh                                     # lists rows: epochs, expected top-1, GPU hours
#   bash examples/paper/rows.sh nkd-resnet18                        # runs this row
#   bash examples/paper/rows.sh uskd-cifar-resnet18 --epochs 1      # flags after the names go to train.py
#   LAUNCH=echo bash examples/paper/rows.sh all                     # prints all commands
#   LAUNCH="torchrun --nproc-per-node 8" IMAGENET=/data/imagenet bash examples/paper/rows.sh uskd-resnet50
#
# A row has its GMACs: the student's and a third of the teacher's. A training step of the student costs three forward
# passes, and the teacher runs only one of these. After the GMACs stands the authors' top-1 in %: baseline -> with the
# method (arXiv 2303.13005 and its official repository). We did not run these rows. README.md in this folder has our own
# measurements. The hours are computed for one A100, not measured: a ResNet-50 of 4.1 GMACs trains at 2,470 images/s
# (NVIDIA's AMP example), and no row is faster than 10,000 images/s (FFCV's ResNet-18). Small layers and slow loaders
# take longer.
set -euo pipefail
LAUNCH=${LAUNCH:-python}
IMAGENET=${IMAGENET:-/imagenet}
NAMES=()
while (($#)) && [[ "$1" != -* ]]; do
	NAMES+=("$1")
	shift
done
PASSED=("$@")
WANTED=" ${NAMES[*]:-} "
FOUND=0
if [[ ${#NAMES[@]} == 0 && ${#PASSED[@]} != 0 ]]; then
	echo "rows.sh: error: ${PASSED[0]} without a row: give names before the flags" >&2
	exit 2
fi

row() { # name epochs images GMACs top-1 flags...
	if [[ ${#NAMES[@]} == 0 ]]; then
		awk -v name="$1" -v epochs="$2" -v images="$3" -v macs="$4" -v top1="$5" 'BEGIN {
			rate = 2470 * 4.1 / macs; if (rate > 10000) rate = 10000
			printf "%-34s %3d epochs  %-14s  %5.1f A100 hours or more\n", name, epochs, top1, epochs * images / rate / 3600 }'
	elif [[ "$WANTED" == *" $1 "* || "$WANTED" == " all " ]]; then
		FOUND=1
		$LAUNCH train.py "${@:6}" --output "runs/paper/$1" ${PASSED[@]+"${PASSED[@]}"}
	fi
}
# name GMACs top-1 flags...
cnn() { row "$1" 100 1281167 "$2" "$3" --data "$IMAGENET" --recipe imagenet-cnn "${@:4}"; }
vit() { row "$1" 300 1281167 "$2" "$3" --data "$IMAGENET" --recipe imagenet-vit "${@:4}"; }
cifar() { row "$1" 200 50000 "$2" "$3" --data cifar100 --recipe cifar "${@:4}"; }
# The result is the top-1 of the last epoch. 0.5 GMACs gives 10,000 images/s, because the loader is the bottleneck.
crd() { # name model flags...
	row "$1" 240 50000 0.5 "not given" --data cifar100 --recipe crd --model "examples/paper/cifar_models.py:$2" "${@:3}"
}

# NKD on ImageNet
cnn nkd-resnet18 3.0 "69.90 -> 71.96" --model resnet18 --kd nkd --teacher resnet34
cnn nkd-mobilenet 1.9 "69.21 -> 72.58" --model mobilenetv1_100 --kd nkd --teacher resnet50 --clip-grad 5
vit nkd-deit-tiny 2.8 "74.42 -> 76.68" --model deit_tiny_patch16_224 --kd nkd \
	--teacher deit3_small_patch16_224.fb_in22k_ft_in1k
vit nkd-deit-base 38.1 "81.76 -> 84.96" --model deit_base_patch16_224 --kd nkd \
	--teacher deit3_large_patch16_224.fb_in22k_ft_in1k

# USKD on ImageNet. The authors trained MobileNetV2, ShuffleNetV2 and RegNetX with other recipes than imagenet-cnn. Their
# ShuffleNetV2 has a linear schedule; this row has a cosine.
cnn uskd-mobilenet 0.6 "69.21 -> 70.38" --self-kd uskd --model mobilenetv1_100
row uskd-mobilenet-v2 300 1281167 0.3 "71.86 -> 72.41" --data "$IMAGENET" --recipe imagenet-mobilenet --self-kd uskd --model mobilenet_v2
row uskd-shufflenet-v2 300 1281167 0.15 "69.55 -> 70.30" --data "$IMAGENET" --recipe imagenet-cnn --self-kd uskd --model shufflenet_v2_x1_0 \
	--epochs 300 --batch-size 1024 --lr 0.5 \
	--weight-decay 4e-5 --schedule cosine --warmup-epochs 4
cnn uskd-resnet18 1.8 "69.90 -> 70.79" --self-kd uskd --model resnet18
cnn uskd-resnet50 4.1 "76.55 -> 77.07" --self-kd uskd --model resnet50
cnn uskd-resnet101 7.8 "77.97 -> 78.54" --self-kd uskd --model resnet101
cnn uskd-regnet 1.6 "76.84 -> 77.30" --self-kd uskd --model regnet_x_1_6gf --batch-size 1024 --opt sgd --lr 0.8 --weight-decay 5e-5 \
	--schedule cosine --warmup-epochs 5
vit uskd-swin-tiny 4.5 "81.18 -> 81.49" --self-kd uskd --model swin_t
vit uskd-deit-tiny 1.3 "74.42 -> 74.97" --self-kd uskd --model deit_tiny_patch16_224

# CIFAR-100
cifar teacher-resnet34 1.2 "not given" --model resnet34
cifar nkd-cifar-resnet18 0.9 "not given" --model resnet18 --kd nkd --teacher runs/paper/teacher-resnet34/student
cifar uskd-cifar-resnet18 0.6 "78.58 -> 79.90" --model resnet18 --self-kd uskd

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

if [[ ${#NAMES[@]} != 0 && $FOUND == 0 ]]; then
	echo "rows.sh: error: no row named${WANTED% }: without a name rows.sh lists them" >&2
	exit 2
fi
