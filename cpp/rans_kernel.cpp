// placeholder body, replaced by the rans kernels
