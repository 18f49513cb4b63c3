accelerate launch --multi_gpu --num_processes 8 dpo.py \
  --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name ours/pairs --beta 0.1 \
  --per_device_train_batch_size 1 --gradient_accumulation_steps 4 --learning_rate 1e-5 \
  --max_length 1024 --num_train_epochs 1 --logging_steps 10 --output_dir out
