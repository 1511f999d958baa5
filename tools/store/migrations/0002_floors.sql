-- Latents on which a run has scored the floors as well (PROTOCOLS §11); a resumed run goes on with the others.
CREATE TABLE data.floors (
    run VARCHAR NOT NULL,
    dictionary VARCHAR NOT NULL,
    latent INTEGER NOT NULL
);
