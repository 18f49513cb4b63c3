python run_glue.py --model_name_or_path FacebookAI/roberta-base \
  --train_file pairs.csv --validation_file pairs-dev.csv --do_train --do_eval \
  --max_seq_length 512 --per_device_train_batch_size 32 --learning_rate 1e-5 --weight_decay 0.1 \
  --adam_beta1 0.9 --adam_beta2 0.98 --lr_scheduler_type polynomial --warmup_ratio 0.06 --fp16 \
  --num_train_epochs 10 --eval_strategy epoch --metric_for_best_model accuracy --load_best_model_at_end
