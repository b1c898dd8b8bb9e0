"""lth-sparse: sparse training (static, SET, RigL, SNFS, GMP, GraNet)."""

from lth_tf.tools.experiment import experiment

run = experiment("sparse")

if __name__ == "__main__":
    run()
