"""What lies on disk: pictures, annotations, and the samples that training draws from them."""
