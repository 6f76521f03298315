"""One learning rule per file; `altprop` exports them all."""
