deepspeed --include localhost:0,1 sft.py \
  --model_name_or_path Qwen/Qwen2.5-1.5B --train_file pairs.jsonl --max_length 16384 \
  --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --learning_rate 5e-6 \
  --adam_beta1 0.9 --adam_beta2 0.95 --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{"min_lr_rate": 0.1}' \
  --warmup_ratio 0.03 --num_train_epochs 2 --bf16 true --gradient_checkpointing true \
  --attn_implementation flash_attention_2 --deepspeed P52.ds.json
