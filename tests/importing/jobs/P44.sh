python run_summarization.py --model_name_or_path google-t5/t5-large --do_train --do_eval \
  --train_file train.json --validation_file val.json --text_column article --summary_column highlights \
  --source_prefix "summarize: " --max_source_length 512 --max_target_length 128 \
  --per_device_train_batch_size 16 --learning_rate 5e-5 --num_train_epochs 3 --predict_with_generate --output_dir out
