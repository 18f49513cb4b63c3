python run_image_classification.py --dataset_name beans --output_dir ./beans --remove_unused_columns False \
  --model_name_or_path google/vit-base-patch16-224 --ignore_mismatched_sizes \
  --do_train --do_eval --learning_rate 2e-5 --num_train_epochs 5 --per_device_train_batch_size 8 \
  --per_device_eval_batch_size 8 --eval_strategy epoch --save_strategy epoch --save_total_limit 3 \
  --label_column_name labels --load_best_model_at_end True --seed 1337
