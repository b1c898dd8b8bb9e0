"""Find, verify and ship sparse trainable networks ("tickets") with TensorFlow and Keras."""
