#!/bin/bash
export WANDB_DISABLED=true
deepspeed --num_gpus=8 train.py \
    --model_name_or_path meta-llama/Llama-2-7b-hf --data_path instructions.json --fp16 True \
    --per_device_train_batch_size 64 --gradient_accumulation_steps 1 --num_train_epochs 3 \
    --learning_rate 2e-5 --warmup_steps 2 --lr_scheduler_type cosine --evaluation_strategy no \
    --gradient_checkpointing True --save_steps 300 --report_to none --deepspeed P56.ds.json
