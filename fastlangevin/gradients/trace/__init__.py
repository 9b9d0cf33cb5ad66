"""An engine for any energy: its operators, forward and back, are replayed without autograd."""
