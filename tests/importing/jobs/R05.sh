#!/bin/bash
# One node, two cards; the optimizer's state stays in host memory.
MODEL=meta-llama/Llama-3.2-1B
deepspeed --num_gpus 2 --master_port 29501 finetune.py \
  --model_name_or_path $MODEL --train_file data/alpaca_zh.json --output_dir out/llama-1b \
  --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --num_train_epochs 3 \
  --learning_rate 1e-5 --lr_scheduler_type cosine --warmup_steps 1000 \
  --adam_beta1 0.9 --adam_beta2 0.95 --max_seq_length 512 --gradient_checkpointing True \
  --bf16 True --logging_steps 10 --save_steps 500 --deepspeed R05.ds.json
