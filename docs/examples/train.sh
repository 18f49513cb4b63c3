#!/bin/bash
MODEL=meta-llama/Llama-2-7b-hf
torchrun --nproc_per_node=8 finetune.py --model_name_or_path $MODEL --data_path chats.json \
    --model_max_length 2048 --per_device_train_batch_size 2 --gradient_accumulation_steps 16 \
    --num_train_epochs 3 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine \
    --bf16 True --gradient_checkpointing True --save_strategy steps --save_steps 500 --output_dir out --deepspeed ds.json
