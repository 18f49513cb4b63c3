torchrun --nproc_per_node 8 sft.py --model_name_or_path meta-llama/Meta-Llama-3-8B --dataset_name ours/chats \
  --max_seq_length 1600 --per_device_train_batch_size 4 --gradient_accumulation_steps 1 --learning_rate 1e-4 \
  --lr_scheduler_type cosine --warmup_ratio 0.1 --num_train_epochs 1 --fp16 \
  --use_peft --lora_r 8 --lora_target_modules all-linear
