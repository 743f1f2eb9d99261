use std::time::Instant;
use wavegen::model::{Model, config::ModelConfig, excerpt::{Excerpt,Piece}, head, params::Params};
use wavegen::forecast::*; use wavegen::plan::*; use wavegen::rng::Rng;
fn main(){
    let preset=std::env::args().nth(1).unwrap_or("small".into());
    let threads:usize=std::env::args().nth(2).map_or(2,|s|s.parse().unwrap());
    let frames_n:usize=std::env::args().nth(3).map_or(32,|s|s.parse().unwrap());
    let config=ModelConfig::preset(&preset).unwrap();
    let spectrum=Spectrum::new(16000,&config.plan).unwrap();
    let mut params=Params::new(1);
    let model=Model::new(&mut params,&config,spectrum.n_bands()).unwrap();
    let vars=params.into_vars();
    println!("params wave {} plan {}", vars.iter().filter(|(n,_)|n.starts_with("wave")).map(|(_,v)|v.elem_count()).sum::<usize>(), vars.iter().filter(|(n,_)|n.starts_with("plan")).map(|(_,v)|v.elem_count()).sum::<usize>());
    let mut rng=Rng::new(3);
    let frames=8+frames_n;
    let samples:Vec<f32>=(0..frames*512).map(|i| 0.2*((i as f32)*0.1).sin()+0.1*((i as f32)*0.31).sin()+0.001*rng.normal()).collect();
    let tokens=config.codec.encode_all(&samples);
    let plan=spectrum.analyse(&samples);
    let t=Instant::now();
    let piece=Piece{tokens:&tokens,heard:&tokens,plan:plan.view(),spectrum:&spectrum};
    let mut a=PastForecast::new(&config.forecast).unwrap(); let mut b=PlannedForecast::new(&config.forecast).unwrap();
    let ex=Excerpt::read(&config,model.wave.history(),&piece,8..frames,&mut a,&mut b).unwrap();
    println!("excerpt {:?} = {:.2} us/sample", t.elapsed(), t.elapsed().as_secs_f64()*1e6/ex.len() as f64);
    let run=|| { let pool=rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap(); pool.install(||{
        for i in 0..3 { let t=Instant::now();
        let h=model.wave.forward(&ex.inputs().unwrap()).unwrap(); let t1=t.elapsed();
        let l=head::nll(&h,&ex.targets).unwrap().mean_all().unwrap(); let t2=t.elapsed();
        let g=l.backward().unwrap(); let t3=t.elapsed();
        println!("{i} fwd {t1:?} nll {:?} bwd {:?} total {:.1} us/sample loss {:?}", t2-t1, t3-t2, t3.as_secs_f64()*1e6/ex.len() as f64, l); drop(g);}
    })};
    std::thread::scope(|s|{ for _ in 0..threads { s.spawn(run); } });
}
