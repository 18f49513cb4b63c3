CUDA_VISIBLE_DEVICES=0 python sft.py --model_name_or_path Qwen/Qwen2.5-7B-Instruct \
  --dataset_name ours/messages --eval_strategy steps --eval_steps 100 --dataset_test_split test \
  --per_device_train_batch_size 4 --gradient_accumulation_steps 8 --learning_rate 2e-4 \
  --lr_scheduler_type cosine --warmup_steps 10 --num_train_epochs 3 --max_length 1024 \
  --use_peft --lora_r 16 --lora_alpha 32 --lora_dropout 0.05 --lora_target_modules q_proj k_proj v_proj o_proj \
  --assistant_only_loss true --bf16 true --gradient_checkpointing true
