export TASK_NAME=mrpc
python run_glue.py \
  --model_name_or_path google-bert/bert-base-cased --task_name $TASK_NAME --do_train --do_eval \
  --max_seq_length 64 --per_device_train_batch_size 16 --learning_rate 2e-5 --num_train_epochs 3 \
  --output_dir /tmp/$TASK_NAME/
