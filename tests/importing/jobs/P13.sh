python run_glue.py --model_name_or_path bert-base-cased --task_name mrpc --do_train --do_eval \
  --max_seq_length 128 --per_device_train_batch_size 32 --optim sgd --learning_rate 1e-1 \
  --max_grad_norm 1.0 --num_train_epochs 3 --output_dir out/mrpc-sgd
