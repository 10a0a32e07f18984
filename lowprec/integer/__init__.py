"""The integer model: operators on codes, the executor, its packed file. Only ``convert`` knows fake-quant layers."""
