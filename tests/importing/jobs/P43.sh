python run_mlm.py --model_name_or_path FacebookAI/roberta-large --train_file corpus.txt --validation_file dev.txt \
  --do_train --do_eval --max_seq_length 512 --per_device_train_batch_size 6 --learning_rate 5e-5 \
  --lr_scheduler_type constant_with_warmup --warmup_steps 100 --num_train_epochs 3 --output_dir out
