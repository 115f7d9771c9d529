"""The pages that people see, built with NiceGUI: they read queries and send commands, and decide nothing."""
