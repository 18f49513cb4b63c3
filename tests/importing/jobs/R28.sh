accelerate launch --config_file R28.acc.yaml sft.py \
  --model_name_or_path Qwen/Qwen3-8B --dataset_name ours/one-answer-chats \
  --max_length 20000 --per_device_train_batch_size 2 --gradient_accumulation_steps 8 \
  --learning_rate 1e-5 --weight_decay 0.1 --lr_scheduler_type cosine --warmup_ratio 0.05 \
  --num_train_epochs 3 --save_strategy epoch --bf16 true --gradient_checkpointing true
