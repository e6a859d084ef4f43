#!/usr/bin/env bash
# From raw files to PPO and DPO on real human preferences: every command, printed before it runs.
#
#     bash data/hh_rlhf/road.sh SOURCE [OUT]      # from the repository's root; OUT is out/real
#
# SOURCE holds hh_rlhf/pairs.jsonl.gz, tinystories/{train,valid}.txt.gz and
# instruct/preference_data.jsonl.gz; the README beside this file describes them. OUT has to be new.
set -eu

source=${1:?usage: bash data/hh_rlhf/road.sh SOURCE [OUT]}
out=${2:-out/real}
data=$out/data

# One thread is the most efficient at this size.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
# Left alone, glibc gives each large tensor's memory back to the system and asks for it anew, which
# took up to a third of the time; these two make it keep what it has. They change no result.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184

run() {
    echo
    echo "+ $*"
    "$@"
}

# 1. Files. Folds 0 and 1 are held out, each from a reward model of its own; short/ has the
#    conversations that leave a small context room for an answer.
for fold in 0 1; do
    run python data/hh_rlhf/prepare.py --source "$source/hh_rlhf/pairs.jsonl.gz" --fold $fold \
        --subset helpful-base,helpful-rejection-sampled --out "$data/fold$fold"
done
run python data/hh_rlhf/prepare.py --source "$source/hh_rlhf/pairs.jsonl.gz" --fold 0 \
    --subset helpful-base,helpful-rejection-sampled --max_chars 600 --out "$data/short"
run python data/tinystories/prepare.py --source "$source/tinystories" --out "$data/tinystories"

# Both reward models start from one tokenizer, base and SFT model, which may have read neither fold:
# they get what is in *both* training sets, line by line, or document by document where a blank line
# (RS = "") parts them.
common='NR == FNR { seen[$0]; next } $0 in seen'
awk "$common" "$data"/fold{0,1}/demonstrations.jsonl > "$data/demonstrations.jsonl"
awk "BEGIN { RS = \"\"; ORS = \"\n\n\" } $common" "$data"/fold{0,1}/text.txt > "$data/text.txt"
wc -l "$data/demonstrations.jsonl" "$data/text.txt"

# 2. Tokenizer, base model, SFT.
run python -m minirlhf.tokenizer "$data/text.txt" "$data/tinystories/train.txt" \
    --vocab_size 4096 --out "$out/tokenizer.json"
run python train_pretrain.py --text "$data/tinystories/train.txt,$data/text.txt" \
    --tokenizer "$out/tokenizer.json" --n_layer 4 --n_head 4 --n_embd 128 --n_hidden 344 \
    --block_size 384 --num_steps 2000 --batch_size 8 --lr 3e-3 --warmup 100 --out "$out/pretrain"
run python train_sft.py --init "$out/pretrain" --data "$data/demonstrations.jsonl" \
    --too_long drop --num_epochs 2 --lr 1e-3 --out "$out/sft"

# 3. Reward models: for each held-out fold two, of two data orders, because one alone owes much to
#    luck; and one for manners.
for fold in 0 1; do
    for seed in 0 1; do
        run python train_rm.py --init "$out/sft" --data "$data/fold$fold/train.jsonl" \
            --too_long cut --num_epochs 1 --lr 5e-4 --held_out 0.02 --max_new_tokens 96 \
            --seed $seed --out "$out/rm${fold}_seed$seed"
    done
done
run python data/hh_rlhf/measure.py --folds "$data/fold0,$data/fold1" \
    --models "$out/rm0_seed0+$out/rm0_seed1,$out/rm1_seed0+$out/rm1_seed1"
run python train_rm.py --init "$out/sft" --data "$source/instruct/preference_data.jsonl.gz" \
    --num_epochs 4 --lr 1e-3 --held_out 0.2 --max_new_tokens 96 --out "$out/rm_polite"

# 4. PPO against the first reward model, DPO on the same pairs.
run python train_ppo.py --init "$out/sft" --reward_model "$out/rm0_seed0" \
    --prompts "$data/short/prompts.jsonl" --num_steps 60 --rollout_size 64 --minibatch_size 32 \
    --num_epochs 2 --lr 1e-4 --critic_lr 3e-4 --beta 0.1 --max_new_tokens 96 --out "$out/ppo"
run python train_dpo.py --init "$out/sft" --data "$data/fold0/train.jsonl" --too_long cut \
    --num_epochs 1 --lr 3e-4 --beta 0.1 --micro_batch_size 8 --out "$out/dpo"

# 5. Win rates on held-out prompts: by the reward model that PPO was trained on, then by the other.
for judge in 0 1; do
    run python evaluate.py --models "$out/ppo,$out/dpo" --against "$out/sft" \
        --reward_model "$out/rm${judge}_seed0" --prompts "$data/short/heldout_prompts.jsonl" \
        --courtesy "" --refusal "" --max_new_tokens 96 --batch_size 64 --show 0 \
        --out "$out/eval_by_rm$judge"
done
