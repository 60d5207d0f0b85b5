"""Time and memory of hypergradients, side by side with plain training and with other libraries.

``python -m tests.benchmarks`` from the root of the repository, in an environment with the ``bench`` extra.

``catalogue``   what is measured: the workloads and the systems
``workloads``   the training problems, made from a seed
``systems``     the same training loop, differentiated by each system
``measure``     one measurement, in a process of its own
``runner``      starts the processes, interleaved
``agreement``   are the hypergradients right? asked before any time is printed
``report``      tables, the CSV, the documentation's block
``figures``     time and memory over the number of steps
"""
