NODES=1
deepspeed --num_nodes $NODES --num_gpus 8 sft.py \
  --model_name_or_path Qwen/Qwen2.5-14B --dataset_name ours/one-answer --max_length 8192 --packing true \
  --per_device_train_batch_size 1 --gradient_accumulation_steps 16 --learning_rate 5e-7 \
  --adam_beta1 0.9 --adam_beta2 0.95 --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{"min_lr_rate": 0.1}' \
  --warmup_ratio 0.03 --num_train_epochs 1 --bf16 true --gradient_checkpointing true \
  --attn_implementation flash_attention_2 --deepspeed P50.ds.json
