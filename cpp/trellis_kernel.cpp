// placeholder body, replaced by the trellis kernels
