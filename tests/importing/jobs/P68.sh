python run_clm.py --model_type openai-gpt --tokenizer_name openai-gpt --config_overrides n_positions=512 \
  --train_file books.txt --block_size 512 --do_train --per_device_train_batch_size 8 --gradient_accumulation_steps 8 \
  --learning_rate 2.5e-4 --weight_decay 0.01 --lr_scheduler_type cosine --warmup_steps 2000 --fp16 --num_train_epochs 1
