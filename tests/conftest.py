"""Two logical CPUs, so that distribution is tested everywhere."""

from lth_tf.compat import tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
