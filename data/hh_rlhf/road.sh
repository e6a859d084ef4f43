#!/usr/bin/env bash
# From raw files to PPO and DPO on real human preferences: every command, in order, printed as it runs.
#
#     bash data/hh_rlhf/road.sh SOURCE [OUT]        # from the repository's root; OUT: out/real
#
# SOURCE has hh_rlhf/pairs.jsonl.gz, tinystories/{train,valid}.txt.gz and
# instruct/preference_data.jsonl.gz; README.md beside this file says what they are. OUT has to be new.
set -eu
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive  # one thread is the most efficient at this size

source=${1:?usage: bash data/hh_rlhf/road.sh SOURCE [OUT]}
out=${2:-out/real}
data=$out/data
run() { echo; echo "+ $*"; "$@"; }

# 1. Files. Folds 0 and 1 are held out, each from a reward model of its own.
for fold in 0 1; do
    run python data/hh_rlhf/prepare.py --source "$source/hh_rlhf/pairs.jsonl.gz" --fold $fold \
        --out "$data/fold$fold"
done
run python data/hh_rlhf/prepare.py --source "$source/hh_rlhf/pairs.jsonl.gz" --fold 0 \
    --max_chars 600 --out "$data/short"
run python data/tinystories/prepare.py --source "$source/tinystories" --out "$data/tinystories"
# Tokenizer, base model and SFT model are shared by both reward models, so they may see neither held-out
# fold: they get what is in *both* training sets. A text's documents are separated by blank lines (RS="").
both='NR == FNR { seen[$0]; next } $0 in seen'
awk "$both" "$data"/fold{0,1}/demonstrations.jsonl > "$data/demonstrations.jsonl"
awk 'BEGIN { RS = ""; ORS = "\n\n" }'" $both" "$data"/fold{0,1}/text.txt > "$data/text.txt"

# 2. Tokenizer, base model, SFT.
run python -m minirlhf.tokenizer "$data/text.txt" "$data/tinystories/train.txt" \
    --vocab_size 4096 --out "$out/tokenizer.json"
run python train_pretrain.py --text "$data/tinystories/train.txt,$data/text.txt" \
    --tokenizer "$out/tokenizer.json" --block_size 384 --num_steps 2000 --batch_size 8 --lr 3e-3 \
    --warmup 100 --out "$out/pretrain"
run python train_sft.py --init "$out/pretrain" --data "$data/demonstrations.jsonl" \
    --too_long drop --num_epochs 2 --out "$out/sft"

# 3. A reward model for each held-out fold, and one for manners.
for fold in 0 1; do
    run python train_rm.py --init "$out/sft" --data "$data/fold$fold/train.jsonl" --too_long cut \
        --held_out 0.02 --out "$out/rm$fold"
done
run python data/hh_rlhf/measure.py --models "$out/rm0,$out/rm1" --folds "$data/fold0,$data/fold1"
run python train_rm.py --init "$out/sft" --data "$source/instruct/preference_data.jsonl.gz" \
    --held_out 0.2 --num_epochs 3 --out "$out/rm_polite"

# 4. PPO against the first reward model, DPO on the same pairs.
run python train_ppo.py --init "$out/sft" --reward_model "$out/rm0" \
    --prompts "$data/short/prompts.jsonl" --num_steps 60 --rollout_size 64 --max_new_tokens 64 \
    --out "$out/ppo"
run python train_dpo.py --init "$out/sft" --data "$data/fold0/train.jsonl" --too_long cut \
    --out "$out/dpo"

# 5. Win rates on held-out prompts: by the reward model that PPO was trained on, then by the other.
for judge in 0 1; do
    run python evaluate.py --models "$out/ppo,$out/dpo" --against "$out/sft" \
        --reward_model "$out/rm$judge" --prompts "$data/short/heldout_prompts.jsonl" \
        --max_new_tokens 64 --limit 300 --show 2 --out "$out/eval_by_rm$judge"
done
