"""A backend of Triton that compiles nothing: with TRITON_INTERPRET=1 no kernel asks it to."""
