"""Row optimizers on records in their slots: Adam, row-wise Adagrad and RMSprop, and SGD."""
