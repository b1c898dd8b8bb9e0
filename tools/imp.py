"""lth-imp: iterative magnitude pruning with rewinding."""

from lth_tf.tools.experiment import experiment

run = experiment("imp")

if __name__ == "__main__":
    run()
