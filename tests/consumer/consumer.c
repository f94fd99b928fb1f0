/* consumer_c BUNDLE QUERY: prints rows and dim of the query's vectors, and their sum. */
#include <cembed.h>
#include <stdio.h>
#include <string.h>

int main(int argc, char **argv) {
    cembed_options options = CEMBED_OPTIONS;
    cembed_bundle *bundle = NULL;
    cembed_vectors vectors = {0};
    double sum = 0;
    size_t i;
    if (argc != 3) return 2;
    if (cembed_open(argv[1], &options, &bundle) != CEMBED_OK ||
        cembed_embed_query(bundle, argv[2], strlen(argv[2]), NULL, &vectors) != CEMBED_OK) {
        fprintf(stderr, "%s\n", cembed_error());
        cembed_close(bundle);
        return 1;
    }
    for (i = 0; i < vectors.rows * vectors.dim; ++i) sum += vectors.data[i];
    printf("%zu %zu %.5f\n", vectors.rows, vectors.dim, sum);
    cembed_vectors_free(&vectors);
    cembed_close(bundle);
    return 0;
}
